"""The cards."""

from qlora.training.outputs import write_adapter_card

FACTS = {
    "base_model": "owner/name",
    "data": "mine.jsonl",
    "rows": 400,
    "steps": 100,
    "learning_rate": 1.32e-3,
    "loss": 0.1234,
    "eval_loss": None,
    "r": 16,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "quant_type": "nf4",
    "blocksize": 64,
    "double_quant": True,
}


def test_adapter_card_says_what_was_done(tmp_path):
    write_adapter_card(tmp_path, FACTS)
    card = (tmp_path / "README.md").read_text()
    for said in ("base_model: owner/name", "NF4", "rank 16", "mine.jsonl (400 rows)", "0.1234"):
        assert said in card
    assert "evaluation loss" not in card
    write_adapter_card(tmp_path, {**FACTS, "eval_loss": 0.5, "base_model": "/home/me/model"})
    assert "base_model:" not in (tmp_path / "README.md").read_text()  # no name on the hub
    assert "# LoRA adapter for model" in (tmp_path / "README.md").read_text()
    assert "evaluation loss 0.5000" in (tmp_path / "README.md").read_text()
