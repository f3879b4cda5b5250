. $(dirname $0)/../env.sh
$PY - <<'P'
import sys, os, time, resource, struct
from pathlib import Path
sys.path.insert(0, os.environ["PYTHONPATH"] + "/tests")
import test_gguf as t
raw = bytearray(t.write(Path("m.gguf"), t.source_model("llama"), t.Written()).read_bytes())
at = bytes(raw).find(b"llama.block_count") + len("llama.block_count") + 4
raw[at : at + 4] = struct.pack("<I", 2**30); Path("m.gguf").write_bytes(raw)
resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30,) * 2); began = time.time()
from mlx_distill.models.gguf.convert import convert
try: convert(Path("m.gguf"), Path("out"))
except BaseException as e: print(type(e).__name__, f"after {time.time() - began:.0f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB (limit of this test: 4 GB); file: {len(raw)} bytes")
P
