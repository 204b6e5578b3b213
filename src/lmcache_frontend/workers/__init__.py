"""`--workers`: more processes that serve proxied requests on the same port, beside the main one that does all.

supervisor: starts them, tells them of the nodes, and starts one again that has ended; worker: such a process; channel:
the frames between the two, with open files; snapshot: the registry in a frame; adopting: a connection on its way to the
main process; ports: sockets that share a port.
"""
