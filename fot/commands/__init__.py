"""The subcommands of ``fot``: each module has ``add(commands)``; what they share is in ``options``."""
