"""How large a thing may be that somebody else has written: files of a checkpoint, run files, settings, lines of data.

Each limit is far above what honest files hold, and is looked at before the work begins that it bounds.
"""

# A run's own files, manifests, results and configurations of models: the largest have a line for each tensor of an LLM.
MAX_JSON_BYTES = 2**26
# Lists and mappings in each other. Ours have six, tokenizers and configurations of models not twenty.
MAX_JSON_DEPTH = 64
# A configuration that people write has hundreds of values. Aliases of aliases stand for billions in a few lines.
MAX_YAML_VALUES, MAX_YAML_DEPTH, MAX_YAML_CHARACTERS = 10_000, 40, 2**18
# Layers of an encoder or LLM, and indices in a list of them: a thousand have been trained. Each is built as a module.
MAX_LAYERS = 4096
# Experts, heads, groups and the like of one layer; some are modules too.
MAX_PARTS = 2**16
# Classes of a model with a head for them: transformers makes a mapping of this size before anybody looks at it.
MAX_LABELS = 2**20
# Positions: some models compute a table of them. The longest context published has ten million.
MAX_POSITIONS = 2**27
# Rank of a LoRA adapter; one as wide as the LLM is none any more.
MAX_RANK = 2**15

# The names in front of a safetensors file; one of a mixture of experts has 20,000 tensors and 3 MB of names.
MAX_HEADER_BYTES, MAX_TENSORS = 2**25, 2**18
# A tokenizer of 400,000 pieces has about 60 MB.
MAX_TOKENIZER_BYTES = 2**29

# A line of a data file, of a record or of predictions: a whole book has a megabyte.
MAX_LINE_BYTES = 2**24
# A JSON file of records, which is read whole; more go into JSON lines, which are not.
MAX_WHOLE_BYTES = 2**31
# A thousand rows of a Parquet file; a column may say one long text a billion times in a few bytes.
MAX_ROWS, MAX_ROWS_BYTES = 1024, 2**30
