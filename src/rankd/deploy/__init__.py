"""Shards and ranking servers on a cluster: Ray places, supervises and moves them; requests never pass through it.

    deployment.py         the TOML file of `rankd deploy up`
    roles.py              what a process is: a shard or a ranking server; its command, and how it is asked for health
    leashed.py            the process's first lines: it ends with whoever started it
    supervisor.py         one process: started, watched, started again
    process_report.py     what a supervisor says of it
    agent.py              a supervisor as a Ray actor: one for each process, on the node where Ray puts it
    ray_fleet.py          all agents of a deployment: the only file that talks to Ray about them
    deployment_record.py  what is to run, kept where Ray keeps its actors
    controller.py         up, scale, apply, drain, down: changes that lose no request
    controller_actor.py   the controller as a Ray actor
    ray_session.py        the command line's way to Ray, and a Ray of this machine alone

A change: new processes start beside the old ones -> all are healthy -> ranking servers get a new placement
(`shards.placement_file`) -> none of them asks the old ones any more -> those drain and end.
"""
