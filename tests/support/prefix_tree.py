"""What prefix groups must be, from the numbers of leading slots that pairs of rows share."""

from lim_kernels.prefix_groups import MAX_LEVELS


def groups_of(found, row):
    """The groups of one row, innermost first, and the positions that they leave to it."""
    path, group = [], int(found["innermost"][row])
    while group >= 0:
        path.append(group)
        group = int(found["parents"][group])
    return path


def members_of(found, group):
    return found["members"][group, : found["counts"][group]].tolist()


def check_tree(found, shared):
    """Every row's positions fall to its groups, one after another, then to itself; groups are whole.

    Args:
        found: the fields of `PrefixGroups` by name; shared: int64 [B, B] in granules, zero on the diagonal.
    """
    for row in range(len(shared)):
        lengths = sorted({n for n in shared[row].tolist() if n})[:MAX_LEVELS]
        path = groups_of(found, row)
        assert [int(found["ends"][group]) for group in reversed(path)] == lengths
        assert int(found["own_starts"][row]) == (lengths[-1] if lengths else 0)
        position = int(found["own_starts"][row])
        for group in path:
            assert int(found["ends"][group]) == position > int(found["starts"][group])
            same = [other for other in range(len(shared)) if other == row or shared[row, other] >= position]
            assert members_of(found, group) == same and len(same) > 1
            position = int(found["starts"][group])
        assert position == 0
        earlier = [min(int(n), max(lengths, default=0)) for n in shared[row, :row].tolist()]
        assert int(found["already_read"][row]) == max(earlier, default=0)
    on_paths = {group for row in range(len(shared)) for group in groups_of(found, row)}
    assert {group for group, count in enumerate(found["counts"].tolist()) if count} == on_paths
