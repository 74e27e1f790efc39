#%md
# How good is the built-in base?

> A thousand held-out captions, judged by networks that nothing was trained with, and real pictures of the same captions as the ceiling.

A fine-tuning method can only be tried on a base that draws people from captions, imperfectly: without people there is nothing to
mend, and without faults nothing to gain. This page measures both for the [built-in base](../11_tiny_base.ipynb), and first asks
whether the [judges](../10b_critics.ipynb) can be believed. It runs small; the thousand captions are

```sh
papermill nbs/experiments/base_quality.ipynb out.ipynb -p n 1000 -p n_train 20000 -p out results/tiny_base.json
```

#%% tags=parameters
n = 24                # held-out captions
n_train = 300         # training pictures among which a sample's nearest is looked for (the base saw 20000)
base_folder = ""      # a trained base; "": the shipped one
guidance = 3.0        # of the samples
steps = 25            # of DPM-Solver++
seed = 0              # of the samples
out = ""              # where to write the numbers; "" writes nothing

#%%
#| hide
import json, os, time, numpy as np, torch, matplotlib.pyplot as plt
from pathlib import Path
from fastcore.test import *
if Path.cwd().name == "experiments": os.chdir("../..")
elif Path.cwd().name == "nbs": os.chdir("..")
import diffusers.utils.logging, transformers.utils.logging
for lib in (diffusers, transformers): lib.utils.logging.disable_progress_bar()
from masked_ldm.critics import (GROUPS, SCENE, captioned, embed_faces, face_rows, frechet, hits, limbs, pck, peaks, tell, to_pixels, verification, world_arrays, Critic, FaceNet)
from masked_ldm.models import BASES, load_base
from masked_ldm.people import VAL_ID, VAL_PEOPLE, captions, sample_scene
from masked_ldm.sample import MaskedLDMPipeline, sample
from masked_ldm.show import picture_grid
from masked_ldm.train import provenance

#%%
root = Path(base_folder or BASES["tiny"]); base = load_base(root); judge = Critic.from_pretrained(root/"judge_perceptual").float(); knows = FaceNet.from_pretrained(root/"judge_face").float()
scenes = [sample_scene(0, VAL_ID+i, VAL_PEOPLE) for i in range(n)]
real = world_arrays(range(VAL_ID, VAL_ID+n), VAL_PEOPLE, workers=2 if n > 200 else 0); empty = world_arrays(range(VAL_ID, VAL_ID+max(8, n//10)), people=False)
x = to_pixels(real["pictures"]); told = tell(judge, x); right = hits(told, scenes)
def between(v, draws=2000): # mean of the rows' means, with the middle 95% of its bootstrap
    v = np.asarray(v, float).reshape(len(v), -1); v = v[np.isfinite(v).any(1)]; s, c = np.nansum(v, 1), np.isfinite(v).sum(1)
    k = np.random.default_rng(0).integers(0, len(v), (draws, len(v))); b = s[k].sum(1)/c[k].sum(1)
    return dict(mean=float(s.sum()/c.sum()), low=float(np.quantile(b, .025)), high=float(np.quantile(b, .975)), n=int(c.sum()))
def told_of(d): return f"{d['mean']:.3f} [{d['low']:.3f}, {d['high']:.3f}]"
test_close(between([1, 0, 1, np.nan])["mean"], 2/3, 1e-9); assert between(np.arange(100))["low"] < 49.5 < between(np.arange(100))["high"]

#%md
## Can the judges be believed?

On real held-out pictures of held-out people they should say what is true. Nothing below is better than this.

#%%
flat = lambda h: np.stack(list(h.values()), 1)
rows, who = face_rows(real); nobody = tell(judge, to_pixels(empty["pictures"]))
sound = dict(attributes=between(flat(right)), pck=between(pck(told["heat"], real)), person_found=between(told["person"]), face_found=between(told["face"]), person_in_empty_place=between(nobody["person"]),
             verification=verification(embed_faces(knows, real["pictures"], rows), who))
for k, v in sound.items(): print(f"{k:22s}", told_of(v) if isinstance(v, dict) else f"{v:.3f} of pairs")
groups = {g: between(h)["mean"] for g, h in right.items() if np.isfinite(h).any()}

#%md
## What the autoencoder keeps

#%%
with torch.no_grad(): rec = torch.cat([base.decode(base.encode(v)) for v in x.split(50)]).clamp(-1, 1)
psnr = -10*((rec-x)/2).square().mean((1, 2, 3)).log10().numpy(); again = tell(judge, rec); kept = hits(again, scenes)
vae = dict(psnr=between(psnr), **{g: between(kept[g]) for g in ("mood", "eyes")}, attributes=between(flat(kept)), pck=between(pck(again["heat"], real)))
vae["kept"] = {k: vae[k]["mean"]/(groups[k] if k in groups else sound[k]["mean"]) for k in ("mood", "eyes", "attributes", "pck")}
print(f"{vae['psnr']['mean']:.2f} dB; read from reconstructions, relative to originals:", ", ".join(f"{k} {v:.3f}" for k, v in vae["kept"].items()))
picture_grid([x[:10], rec[:10]], ["picture", "decoded"])

#%md
## What the base draws

One sample a caption, in the caption's fullest wording.

#%%
pipe = MaskedLDMPipeline.from_parts(base); t = time.time(); texts = [captions(s)[0] for s in scenes]
drawn = sample(pipe, texts, seed, steps=steps, guidance=guidance, scheduler="dpm", batch_size=50); y = to_pixels(np.stack([np.asarray(im) for im in drawn])); seconds = time.time()-t
seen = tell(judge, y); got = hits(seen, scenes)
samples = dict(person_found=between(seen["person"]), face_found=between(seen["face"]), attributes=between(flat(got)), groups={g: between(h) for g, h in got.items() if np.isfinite(h).any()})
for k in ("person_found", "face_found", "attributes"): print(f"{k:14s} samples {told_of(samples[k])}   real pictures {told_of(sound[k])}")
show = [i for i, s in enumerate(scenes)][:6]; picture_grid([y[show], x[show]], ["sample", "world"], heads=[texts[i] for i in show], scale=2)

#%md
## The room above

Faces: the Fréchet distance of identity embeddings between sampled faces and real ones, beside the same distance between two halves of the real
ones; and mood and eye colour as above. Bodies: the joints that the judge finds, and how far limbs are from the proportions that this world's people always have.

#%%
def faces(told, pictures): # one person a picture, face of 10 pixels or more
    ok = [i for i, s in enumerate(scenes) if len(s.people) == 1 and (told["box"][i, 2:] - told["box"][i, :2] >= 10).all()]
    return embed_faces(knows, pictures, torch.tensor(np.column_stack([ok, told["box"][ok]]), dtype=torch.float32)).numpy() if ok else np.zeros((0, 2))
def bodies(told): return np.array([limbs(peaks(told["heat"][i], told["mask"][i])) for i, s in enumerate(scenes) if len(s.people) == 1])
fr, fs, fv = faces(told, real["pictures"]), faces(seen, np.stack([np.asarray(im) for im in drawn])), faces(again, ((rec.permute(0, 2, 3, 1)+1)*127.5).round().byte().numpy())
body = {k: bodies(v) for k, v in dict(real=told, reconstructed=again, samples=seen).items()}
room = dict(frechet=dict(samples=frechet(fs, fr), reconstructed=frechet(fv, fr), real_halves=frechet(fr[::2], fr[1::2])), joints_found={k: between(v[:, 0]) for k, v in body.items()}, limb_error={k: between(v[:, 1]) for k, v in body.items()},
            mood=dict(samples=samples["groups"]["mood"], real=groups["mood"]), eyes=dict(samples=samples["groups"]["eyes"], real=groups["eyes"]))
print("faces, Fréchet distance to real ones:", ", ".join(f"{k} {v:.3f}" for k, v in room["frechet"].items()))
for k in ("joints_found", "limb_error"): print(f"{k:13s}", ", ".join(f"{a} {told_of(b)}" for a, b in room[k].items()))
assert room["frechet"]["samples"] > room["frechet"]["reconstructed"]

#%md
## Is anything learned by heart?

The nearest training picture, plain or mirrored, by the root mean square of pixels. A base that recites has samples nearer to a training picture than
new pictures of the world are.

#%%
train_ids = range(1, n_train+1); bank = world_arrays(train_ids, workers=2 if n_train > 500 else 0)["pictures"]; bank = torch.from_numpy(np.concatenate([bank, bank[:, :, ::-1]])).flatten(1).half()
def nearest(q): # (B,3,64,64) -> distances and pictures
    q = ((q.permute(0, 2, 3, 1)+1)*127.5).flatten(1); best, where = torch.full((len(q),), 1e9), torch.zeros(len(q), dtype=torch.long)
    for a in range(0, len(bank), 4000):
        d = torch.cdist(q, bank[a:a+4000].float()); m, k = d.min(1); new = m < best; best, where = torch.where(new, m, best), torch.where(new, k+a, where)
    return best/q.shape[1]**.5, to_pixels(bank[where].float().view(-1, 64, 64, 3).byte().numpy())
ds, near = nearest(y); dr, _ = nearest(x)
memory = dict(samples=between(ds.numpy()), real=between(dr.numpy()), smallest_sample=float(ds.min()), smallest_real=float(dr.min()), train=n_train)
print(f"distance to the nearest of {n_train} training pictures (of 255): samples {told_of(memory['samples'])}, held-out pictures {told_of(memory['real'])}; smallest {memory['smallest_sample']:.1f} and {memory['smallest_real']:.1f}")
grid = picture_grid([y[:12], near[:12]], ["sample", "nearest"])
if out: grid.save("nbs/images/nearest.png")
grid

#%%
quality = dict(what="the built-in base on held-out captions", n=n, guidance=guidance, steps=steps, seed=seed, judges=dict(sound, groups=groups), vae=vae, samples=samples, room=room, memory=memory, sampling_seconds=round(seconds), provenance=provenance())
if out: Path(out).write_text(json.dumps(quality, indent=1))

#%md
## The thousand

The same numbers of the long run, from `results/tiny_base.json`. An interval is the middle 95% of a bootstrap over captions.

#%%
known = json.loads(Path("results/tiny_base.json").read_text()); K = lambda *path: told_of(__import__("functools").reduce(lambda d, k: d[k], path, known))
print(f"{known['n']} captions, guidance {known['guidance']}, {known['steps']} steps of DPM-Solver++\n")
print(f"{'':26s}{'samples':24s}real pictures")
for k, name in dict(person_found="a person is found", face_found="a face is found", attributes="caption is right").items(): print(f"{name:26s}{K('samples', k):24s}{K('judges', k)}")
for k, name in dict(joints_found="joints found, of 17", limb_error="limb error, log ratio").items(): print(f"{name:26s}{K('room', k, 'samples'):24s}{K('room', k, 'real')}")
print(f"{'faces, Fréchet distance':26s}{known['room']['frechet']['samples']:<24.3f}{known['room']['frechet']['real_halves']:.3f}")
print(f"\nautoencoder {K('vae', 'psnr')} dB; kept of " + ", ".join(f"{k} {v:.3f}" for k, v in known['vae']['kept'].items()))
print(f"judges: attributes {K('judges', 'attributes')}, PCK@0.1 {K('judges', 'pck')}, verification {known['judges']['verification']:.3f}, a person in an empty place {known['judges']['person_in_empty_place']['mean']:.3f}")

#%md
What is right and what is not, attribute by attribute: the dot is the share of samples that show what the caption says, the bar the same of real pictures.

#%%
g = sorted(known["samples"]["groups"], key=lambda k: known["samples"]["groups"][k]["mean"]); v = [known["samples"]["groups"][k] for k in g]
plt.figure(figsize=(5, 3.6)); plt.barh(g, [known["judges"]["groups"][k] for k in g], color="0.88", label="real pictures")
plt.errorbar([a["mean"] for a in v], range(len(g)), xerr=[[a["mean"]-a["low"] for a in v], [a["high"]-a["mean"] for a in v]], fmt="o", ms=4, label="samples"); plt.xlim(0, 1); plt.xlabel("share right"); plt.legend(loc="lower right");

#%md
Twelve samples and their nearest among all training pictures, from the long run:

![samples above, nearest training pictures below](../images/nearest.png)
