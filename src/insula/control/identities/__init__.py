"""Principals and their rights.

authority.py      `Authority`: the rights of one request
admission.py      checks the options of a spec against these rights
tokens.py         bearer tokens: their text and its check
providers.py      providers of OpenID Connect: their keys, and tokens that they have signed
claims.py         what such tokens say
fetching.py       fetches the providers' documents
cache.py          principals, bindings and tokens in memory, as the store has them
verbs.py          the verbs that change them
"""
