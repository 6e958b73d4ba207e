from measure_solvers import main


def test_it_prints_a_table_of_iterations(capsys):
    main(samples=1, steps=(12,))
    lines = capsys.readouterr().out.splitlines()
    first, second = lines[4:6]
    assert first.startswith("| 12, 0 | ")
    assert second.startswith("| 12, 1 | ")
    cells = [cell.split(" / ") for cell in first.strip("| ").split(" | ")[1:]]
    assert [len(cell) for cell in cells] == [3, 3, 3, 2, 2]
    assert all(1 <= int(number) <= 12 for cell in cells for number in cell)
    assert len(lines) == 3 * 6 + 2
