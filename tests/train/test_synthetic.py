"""The packaged model's log can be made again, and it is the log that the model was trained on."""

from __future__ import annotations

from rankd import Ranker
from rankd.train.synthetic import synthetic_log


def test_the_packaged_model_comes_from_the_seeded_log(demo_ranker: Ranker) -> None:
    log, ids = synthetic_log(), demo_ranker.catalogue.ids
    assert log.equals(synthetic_log())
    names = dict(log.select("item", "title").unique().iter_rows())
    assert {item: names[item] for item in ids.items} == dict(zip(ids.items, ids.item_names, strict=True))
    for user in ids.users[:20]:
        watched = log.filter((log["user"] == user) & (log["event"] != "view"))
        history = demo_ranker.features.stored_history(user)
        assert history is not None
        assert [ids.items[row - 2] for row in history.rows] == watched["item"].tail(len(history)).to_list()
        assert history.times.tolist() == watched["time"].tail(len(history)).to_list()
