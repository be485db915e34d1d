"""Size limits for untrusted input: files of a checkpoint, run files, settings, lines of data.

Each limit is far above what honest files hold, and is checked before the work that it bounds begins.
"""

# JSON files: of runs, manifests, results, model configurations. The largest have a line for each tensor of an LLM.
MAX_JSON_BYTES = 2**26
# Levels of nested lists and mappings. Our files have six, tokenizers and model configurations fewer than twenty.
MAX_JSON_DEPTH = 64
# A hand-written configuration has hundreds of values. Aliases of aliases expand to billions in a few lines.
MAX_YAML_VALUES, MAX_YAML_DEPTH, MAX_YAML_CHARACTERS = 10_000, 40, 2**18
# Layers of an encoder or LLM, and indices in a list of layers. Each is built as a module. A thousand have been trained.
MAX_LAYERS = 4096
# Experts, heads, groups and the like of one layer. Some are modules too.
MAX_PARTS = 2**16
# Classes of a classification head: transformers builds a mapping of this size at once.
MAX_LABELS = 2**20
# Positions: some models compute a table of them. The longest context published has ten million.
MAX_POSITIONS = 2**27
# Rank of a LoRA adapter. One as wide as the LLM is no longer low-rank.
MAX_RANK = 2**15

# The header of a safetensors file. A mixture of experts with 20,000 tensors has a header of 3 MB.
MAX_HEADER_BYTES, MAX_TENSORS = 2**25, 2**18
# A tokenizer of 400,000 pieces has about 60 MB.
MAX_TOKENIZER_BYTES = 2**29

# A line of a data file, of records or of predictions. A book has a megabyte.
MAX_LINE_BYTES = 2**24
# A JSON file of records, which is read at once. Larger data goes into JSON lines, which are read line by line.
MAX_WHOLE_BYTES = 2**31
# Rows of a Parquet file read at once, and their bytes: a few bytes on disk can repeat a long text a billion times.
MAX_ROWS, MAX_ROWS_BYTES = 1024, 2**30
