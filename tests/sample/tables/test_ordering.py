"""Two orders of models, and how far they agree."""

from sample.measure.figures import best_of
from sample.tables.ordering import order


def test_orders_say_how_many_of_the_clear_pairs_stand_alike():
    ours, papers = {"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 2.0, "b": 3.0, "c": 1.0}

    def said(*clear: str, metric: str = "PSNR", papers=papers):
        return order(metric, ours, papers, lambda a, b: a + b in clear)

    both = "PSNR, ours: a, then b, then c; the paper's: b, then a, then c"
    assert said("ab", "ac") == f"{both} (of 3 pairs 2 clear here, 1 of them as in the paper)."
    assert said("ab") == f"{both} (of 3 pairs 1 clear here, 0 of them as in the paper)."
    assert said() == f"{both} (of 3 pairs none clear here)."
    assert said(metric="LPIPS", papers={"a": 1.0, "b": None}) == "LPIPS, ours: c, then b, then a."
    level = "PSNR, ours: a, then b, then c; the paper's: a = c, then b"
    of_two = {"a": 2.0, "b": 1.0, "c": 2.0}
    assert said("ab", "ac", papers=of_two) == f"{level} (of 2 pairs 1 clear here, 1 of them as in the paper)."
    ends = {"PSNR": "max", "IS": "max", "it/s, UCF101": "max", "FVD": "min", "SSIM, largest difference": "min"}
    assert best_of([*ends, "parameters (M)"]) == ends
