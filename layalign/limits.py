"""How large a thing may be that somebody else has written: files of a checkpoint, run files, settings, lines of data.

Each limit is far above what honest files hold, and is looked at before the work begins that it bounds.
"""

# A run's own files, manifests, results and configurations of models: the largest have a line for each tensor of an LLM.
MAX_JSON_BYTES = 2**26
# Lists and mappings in each other. Ours have six, tokenizers and configurations of models not twenty.
MAX_JSON_DEPTH = 64
# A configuration that people write has hundreds of values. Aliases of aliases stand for billions in a few lines.
MAX_YAML_VALUES, MAX_YAML_DEPTH, MAX_YAML_CHARACTERS = 10_000, 40, 2**18
