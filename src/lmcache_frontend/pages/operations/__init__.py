"""One change on many nodes: what there is (`kinds.py`), and how it is planned, carried out and kept (`running.py`)."""
