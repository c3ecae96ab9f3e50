"""Chat, evaluation, and the report of a run. Imports nothing: the report starts without torch."""
