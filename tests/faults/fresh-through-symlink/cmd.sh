. $(dirname $0)/../env.sh
$MD run r.toml --backend mlx --set run.name=x 2>&1 | quiet | tail -1
mkdir big-disk; mv runs/x big-disk/x; ln -s ../big-disk/x runs/x
$MD run r.toml --backend mlx --set run.name=x --fresh 2>&1 | quiet; ls -l runs big-disk
echo "expected: a fresh run; found: the old run is deleted and no new one can begin"
mkdir big-disk/y; ln -s ../big-disk/y runs/y
# a run in a linked folder, killed before its first step, then started again
patched 'import os, signal, mlx_distill.training.loop as t
t.Training.train = lambda self: os.kill(os.getpid(), signal.SIGKILL)' run r.toml --backend mlx --set run.name=y
$MD run r.toml --backend mlx --set run.name=y 2>&1 | quiet
