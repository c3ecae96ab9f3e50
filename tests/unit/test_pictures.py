"""The pictures."""

from qlora.pictures import plot_loss


def test_loss_picture(tmp_path):
    rows = [{"step": i, "loss": 3 / i} for i in range(1, 9)] + [{"step": 8, "eval_loss": 0.5}]
    plot_loss(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
