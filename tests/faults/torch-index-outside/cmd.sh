. $(dirname $0)/../env.sh
cp -r $CHECKOUT/mlx_distill/embedded/weights/student m; mkdir secret; mv m/model.safetensors secret/
printf '\x02\0\0\0\0\0\0\0{}' > m/model-00001-of-00002.safetensors
$PY -c "
import json; raw=open('secret/model.safetensors','rb').read(); n=int.from_bytes(raw[:8],'little'); h=json.loads(raw[8:8+n])
json.dump({'metadata': {}, 'weight_map': {k: '../secret/model.safetensors' for k in h if k != '__metadata__'}}, open('m/model.safetensors.index.json','w'))
from mlx_distill.models.hub import model_fingerprint; from pathlib import Path; print('fingerprint', model_fingerprint(Path('m'))[:16])"
$MD eval m --task embedded:dial --set examples=2 --set max_new_tokens=3 --backend torch 2>&1 | tail -1
$PY -c "
p='secret/model.safetensors'; b=bytearray(open(p,'rb').read()); b[-1000]^=0x40; open(p,'wb').write(b)
from mlx_distill.models.hub import model_fingerprint; from pathlib import Path; print('fingerprint after the weights changed', model_fingerprint(Path('m'))[:16])"
$MD eval m --task embedded:dial --set examples=2 --set max_new_tokens=3 --backend mlx 2>&1 | tail -1 | cut -c1-200
