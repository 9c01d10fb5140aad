"""The reference model: what a tenant's intent says about packets, computed from the intent alone.

It shares no code with what installs rules, nor with the interpreter of what is installed; a test checks the imports.
"""
