"""The table of VAEs: names, options, trained models by folder, and imports that wait until a model is asked for."""

import re
import subprocess
import sys

import pytest
import torch

import vae
from lvdm.errors import UserError
from vae.adapter import DiffusersVAE
from vae.cvvae import CVVAE
from vae.odvae import ODVAE
from vae.univae import UniVAE


def test_names_import_no_torch():
    code = "import sys, vae; vae.names(); sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_classes_behind_the_names_and_their_papers():
    classes = {"univae": UniVAE, "odvae": ODVAE, "cvvae": CVVAE}
    classes |= dict.fromkeys(("sdvae", "svdvae", "cogvideox"), DiffusersVAE)
    assert set(vae.names()) >= set(classes)
    for name, cls in classes.items():
        assert vae.registry.entry(name).resolve() is cls
    for name in vae.names():
        assert re.fullmatch(r"[A-Z].* \(.+\)", vae.registry.entry(name).paper)


def test_wrong_names_and_options_are_user_errors():
    with pytest.raises(UserError, match=r"unknown VAE 'univea'.*did you mean 'univae'.*odvae.*univae.*diffusers:CLASS"):
        vae.build("univea")
    with pytest.raises(UserError, match="'univae' has no option 'widht'"):
        vae.build("univae", widht=8)


@pytest.mark.parametrize("name", vae.names())
def test_a_trained_model_is_loaded_from_its_run_and_its_export(name, tmp_path):
    saved = vae.build(name, **vae.registry.entry(name).tiny)
    saved.save_pretrained(tmp_path / "export")
    for spec in (tmp_path, tmp_path / "export"):
        loaded = vae.load(str(spec))
        assert type(loaded) is type(saved) and not loaded.training and loaded.spec == saved.spec
        assert loaded.latent_sha256() == saved.latent_sha256()


def test_a_model_of_stage_two_comes_back_with_its_d2(tmp_path):
    saved = vae.build("univae", width=8, blocks=1).add_refiner("fresh")
    saved.save_pretrained(tmp_path)
    loaded = vae.load(str(tmp_path))
    assert loaded.spec.refines
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))


def test_a_config_with_options_out_of_range_is_one_line(tmp_path):
    vae.build("univae", width=8, blocks=1).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"nearest"', '"cubic"'))
    with pytest.raises(UserError, match="upsample='cubic'"):
        vae.load(str(tmp_path))
