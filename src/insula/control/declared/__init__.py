"""Declared state: objects from files are created, changed and removed until they are as declared (`insula apply`).

yaml12.py, parse.py   files to documents
kinds/                one file for each kind: its documents, and the verbs that create, change and remove it
merge.py              the three-way merge of declared, last applied and current fields
sets.py               the stored sets, with what was applied last
plan.py               the steps, in order of dependencies, without doing them
apply.py              the verbs apply, diff and dump
"""
