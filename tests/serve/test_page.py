"""The page's own API: what it shows, its bounds, its refusals."""

from __future__ import annotations

import httpx
import pytest

from rankd import Ranker
from rankd.serve.lifecycle import Server

PREFIX = "/v1/models/demo"


def get(server: Server, path: str) -> httpx.Response:
    return httpx.get(server.url + path)


def test_users_and_their_histories(server: Server, demo_ranker: Ranker) -> None:
    users = get(server, f"{PREFIX}/users?limit=7").json()
    assert len(users) == 7
    for user in users:
        answer = get(server, f"{PREFIX}/users/{user['user_id']}").json()
        history = demo_ranker.features.stored_history(user["user_id"])
        assert history is not None
        assert answer["events"] == user["events"] == len(history)
        assert [one["time"] for one in answer["history"]] == history.times[::-1][:200].tolist()
        assert answer["history"][0]["item_name"] == demo_ranker.catalogue.item_name(int(history.rows[-1]))


def test_candidates_are_a_seeded_sample(server: Server) -> None:
    path = f"{PREFIX}/candidates?count=15&seed="
    one, again, other = (get(server, path + seed).json() for seed in ("1", "1", "2"))
    assert one == again
    assert one["items"] != other["items"]
    assert len({item["item_id"] for item in one["items"]}) == 15


def test_items_are_found_by_id_and_by_name(server: Server, demo_ranker: Ranker) -> None:
    item, name = demo_ranker.catalogue.ids.items[3], demo_ranker.catalogue.ids.item_names[3]
    assert get(server, f"{PREFIX}/items?query={item.upper()}").json() == [{"item_id": item, "item_name": name}]
    found = get(server, f"{PREFIX}/items?query={name.split()[0].lower()}&limit=200").json()
    assert {"item_id": item, "item_name": name} in found
    assert get(server, f"{PREFIX}/items?query=zzzz").json() == []


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/users?limit=0", 400, "whole number from 1 to 200"),
        ("/users?limit=many", 400, "whole number from 1 to 200"),
        ("/candidates?count=201", 400, "whole number from 1 to 200"),
        ("/candidates?seed=-1", 400, "whole number from 0"),
        ("/users/nobody", 404, "has no history"),
    ],
)
def test_refusals(server: Server, path: str, status: int, words: str) -> None:
    response = get(server, PREFIX + path)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_the_page_allows_itself_and_nothing_else(server: Server) -> None:
    response = get(server, "/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http://" not in response.text.replace("http://www.w3.org/2000/svg", "")
