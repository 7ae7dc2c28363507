"""Embedding tables in other processes: who has a part of them pools near the data and sends sums.

    shard_layout.py      which shard has which parts, and in which net a table is asked for; shard_config.py: the rest
    streams.py           bytes over TCP or TLS, by a deadline; transport.py: who may listen and connect where
    frames.py            the frame: a header of 32 bytes and a payload; frame_errors.py: errors on the wire
    pool_frames.py       what is asked and answered; handshake.py: who is there, with which plan
    shard_server.py      a shard: shard_connection.py for each client, pool_queue.py for the work
    routing.py           ids of a request -> what each shard is asked, and its answers -> sums
    routing_kernels.py   the loops that split and write; answer_kernels.py: those that add up
    shard_link.py        the client's side of a connection; replica.py keeps one; shard_client.py has those of a shard
    sharded_pooling.py   all shards as one `Pooling`; pending.py: answers on their way, hedges, deadlines
    hot_row_cache.py     rows that are kept here too: row_counting.py says which, kept_rows.py sums them
    placed_tables.py     tables here and on shards; live_tables.py follows placement_file.py while they move
                         (table_config.py chooses)

A request: route -> a call for each shard and net, all at once -> sums by sample -> added in the order of the layout.
"""
