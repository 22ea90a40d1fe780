"""Workers segment slides: in this process, in a child process, or on a cluster."""
