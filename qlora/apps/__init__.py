"""What a person looks at: chat, evaluation, and the report of a run.

Nothing is imported here: the report needs no torch.
"""
