"""Create the processes of a container: the parent's preparation, and the child's steps up to execve(2)."""
