"""Wiro on loopback, with planned faults: for tests, for rehearsals and for `batchrun run --simulate`.

`server.Simulator` is the service as an async context manager, `command.simulate` the same as a process of its
own. Nothing in here is shared with the client: what the client believes of the service is tested against a
second reading of the same facts. Only tool descriptions are read through `batchrun.tools.catalog`.
"""
