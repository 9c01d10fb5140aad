"""Networks of tenants: what they want (`intent`), the face of what realises it (`fabric`), and one realisation each
in a package of its own (`linux`). `addresses` is arithmetic, `probe` sends real packets to find out what is true.
"""
