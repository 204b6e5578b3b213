"""Who calls, and may they: one answer for both servers.

`caller.py` says who calls, `roles.py` what a route needs, `gate.py` compares the two before a handler runs. `table.py`
tells the proxy what the routes behind it need. `browser.py` refuses what another site's page asks.
"""
