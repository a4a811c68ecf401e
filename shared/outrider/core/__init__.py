"""What decides, without sockets, clocks or tasks. Read `reference` first, then `session`."""
