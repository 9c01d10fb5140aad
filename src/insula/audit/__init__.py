"""The audit log: files of JSON objects, one a line, in which no line can be changed unseen.

Every line has a sequence number (`seq`), the SHA-256 of the line before it (`prev`), and an HMAC (`mac`, RFC 2104) by a
key that changes with every line and whose earlier values are erased (forward integrity, Bellare and Yee 1997).

| module | |
|---|---|
| `chain` | sealing and parsing of lines, the key's evolution |
| `keys` | the file with the key of the next line, and the text of a verification key |
| `files` | the log and its rotated files: names, opening, the last line |
| `recovery` | where the chain goes on after a start |
| `floods` | failed attempts beyond a number, which are counted instead of written |
| `writer` | the thread that seals, writes, syncs, rotates |
| `witness` | heads of the chain, appended to a file on another disk |
| `reader` | entries, selected |
| `verification` | finds a changed, missing, repeated or moved line |

**What such a chain can prove.** Without anything else: that the lines from the first to the last are those that were
written, if nobody who could change the files could also compute hashes. That is accident, and hasty hands. With a
*head* (number and hash of a line) that somebody else has kept: that nothing up to that line was changed, by anybody.
With the *verification key*, which is shown once and kept elsewhere: that the lines before a break-in were not changed
by the intruder, who finds only the key of later lines.

**What it can't prove.** Root can stop insulad, write whatever it likes from then on with the key of that moment, and
remove lines at the end that no head covers. A chain has no end of its own: systemd's sealed journals were truncated and
sealed again without notice (CVE-2023-31438, CVE-2023-31439, CVE-2023-31440). Therefore heads go to the store with every
change, to a witness and to the daemon's log; and a copy of the log belongs on another machine.

This package uses only the standard library, and knows nothing of requests or the store.
"""
