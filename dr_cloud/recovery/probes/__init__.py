"""Probes: programs that look at the disks of one stack and say pass or fail. Begin with `runner.run_probes`.

Each probe is a file here, a pydantic model whose fields are its parameters; others come as plug-ins by entry point.
"""
