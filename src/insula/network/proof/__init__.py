"""The proof of isolation: what is installed, interpreted for all packets, compared with the reference model.

prover.py      interprets, compares, and keeps what has not changed
findings.py    differences as findings, each with a packet as its witness; beside it those of links and queues
witnesses.py   sends the witnesses
verify.py      `insula verify`: the proof, and probes between all instances
"""
