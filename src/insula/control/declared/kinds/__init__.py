"""The kinds of declared objects, one in each file; `registry.py` lists them."""
