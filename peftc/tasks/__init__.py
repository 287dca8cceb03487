"""What models are for: tasks, their samples and their figures."""
