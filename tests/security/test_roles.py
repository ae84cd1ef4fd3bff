import re

from lucid.core.exchange import Role
from lucid.core.security.roles import PERMISSIONS, TIERS


def test_every_role_has_a_tier_and_permissions() -> None:
    assert set(PERMISSIONS) == set(TIERS) == set(Role)
    assert [TIERS[role] for role in Role] == ["public", "authenticated", "authenticated", "admin", "admin"]


def test_each_role_holds_all_of_the_ones_before() -> None:
    assert PERMISSIONS[Role.PUBLIC] == ()
    for lower, higher in zip(Role, list(Role)[1:], strict=False):
        assert set(PERMISSIONS[lower]) < set(PERMISSIONS[higher])


def test_spelling() -> None:
    for permissions in PERMISSIONS.values():
        assert list(permissions) == sorted(set(permissions))
        assert all(re.fullmatch(r"[a-z_]+:[a-z_]+", permission) for permission in permissions)
