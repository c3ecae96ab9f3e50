"""`make demo`: a small language model learns a task, in minutes, on any computer."""
