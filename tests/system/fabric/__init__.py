"""The conformance suite of fabrics: worlds of tenants, and which packets arrive in them.

A world is data (`worlds`): tenants with networks, labels, policies, and instances, containers and virtual machines.
`reference` computes from it which connections are allowed, `packets` tries each one with real packets, and a fabric
(`building`) is right if both agree. Nothing here knows how a fabric works.
"""
