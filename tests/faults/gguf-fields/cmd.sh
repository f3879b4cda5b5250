. $(dirname $0)/../env.sh
$PY - <<'P'
import sys, os, struct, shutil
from pathlib import Path
sys.path.insert(0, os.environ["PYTHONPATH"] + "/tests")
import test_gguf as t
from mlx_distill.models.gguf.convert import convert
from mlx_distill.errors import DistillError
base = t.write(Path("m.gguf"), t.source_model("llama"), t.Written()).read_bytes()
for key, value in (("tokenizer.ggml.bos_token_id", 2**32 - 1), ("llama.attention.head_count", 2**32 - 1), ("llama.attention.head_count", 3), ("llama.feed_forward_length", 7), ("llama.embedding_length", 63)):
    raw = bytearray(base); at = bytes(raw).find(key.encode()) + len(key) + 4; raw[at : at + 4] = struct.pack("<I", value); Path("n.gguf").write_bytes(raw); shutil.rmtree("out", ignore_errors=True)
    try: convert(Path("n.gguf"), Path("out")); print(key, value, "ACCEPTED")
    except DistillError as e: print(key, value, "refused:", str(e)[:120])
    except Exception as e: print(key, value, "TRACEBACK", type(e).__name__, e)
P
