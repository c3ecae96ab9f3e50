"""The applications: chat, evaluation, and the report of a run. Imports nothing, as the report needs
no torch."""
