from test_push import *
def test_x(hub, releases, market, tmp_path):
    run_elsewhere(hub.environment(tmp_path / "here"), UPLOADER, MODEL, *releases, folder=tmp_path)
    hub.asked.clear()
    said = run_elsewhere(hub.environment(tmp_path / "there", None), MODEL_STRANGER, MODEL, market, tmp_path, "main", folder=tmp_path)
    for n,p in hub.asked: print(n,p)
    assert 0
