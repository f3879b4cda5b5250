# sourced by each cmd.sh: MD = the command line; a recipe of seconds; a run stopped after its checkpoint of step 4
: "${PY:?a python with mlx-distill installed}" "${CHECKOUT:?the checkout}"
export PYTHONPATH=$CHECKOUT HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
MD=${MD:-"$PY -m mlx_distill"}; D=$(mktemp -d); cd $D
cat > r.toml <<'R'
teacher.model = "embedded:teacher"
student.model = "embedded:student"
data.train_examples = 24
data.validation_examples = 4
batch.micro_batch_size = 2
batch.global_batch_size = 4
batch.pad_multiple = 16
optim.steps = 6
run.checkpoint_every = 2
run.validate_every = 2
R
quiet() { grep -v "^training\|^plan:\|^backend\|^scoring"; }
STOP='
import os, signal, mlx_distill.runs.run_folder as r
save = r.RunFolder.save_checkpoint
def then_die(self, state, write, keep):
    save(self, state, write, keep)
    if state.step == 4: os.kill(os.getpid(), signal.SIGKILL)
r.RunFolder.save_checkpoint = then_die
'
stopped() { patched "$STOP" run r.toml --backend mlx --set run.name=$1 > /dev/null 2>&1; } # a run NAME killed right after its checkpoint of step 4
patched() { # CODE ARGUMENTS…: the command line after CODE was executed in it
  code=$1; shift
  case "$MD" in *md.py) CASE_PATCH="$code" $MD "$@";; *) $PY -c "$code
import sys
from mlx_distill.cli import main
main()" "$@";; esac
}
