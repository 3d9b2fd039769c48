"""Both rendering back ends behind one seam."""

import numpy as np
import pytest

from librobot.errors import LibrobotError
from librobot.sim.render import GL, RAYS, make_renderer

SCENE = """
<mujoco><worldbody>
  <light pos="0 0 3" dir="0 0 -1" directional="true"/>
  <camera name="top" pos="0 0 1" fovy="90"/>
  <geom type="plane" size="0 0 1" rgba="0.8 0.8 0.8 1"/>
  <geom type="box" size="0.2 0.1 0.05" pos="0.5 0 0.05" rgba="1 0 0 1"/>
  <geom type="box" size="0.2 0.1 0.05" pos="0 0.5 0.05" rgba="0 0 1 1"/>
  <geom type="sphere" size="0.3" pos="-0.5 -0.5 0" rgba="0 1 0 0"/>
</worldbody></mujoco>"""


@pytest.fixture
def scene():
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def gl_or_skip(model, height: int, width: int):
    try:
        return make_renderer(model, height, width, "gl")
    except LibrobotError as error:
        pytest.skip(str(error))


def check_picture(picture: np.ndarray) -> None:
    """The camera looks straight down: x is to the right, y up; the box at x is red, the one at y blue."""
    assert picture.shape == (40, 40, 3)
    assert picture.dtype == np.uint8
    red, blue = picture[20, 31].astype(int), picture[8, 20].astype(int)
    assert red[0] > 2 * max(red[1], red[2], 1)
    assert blue[2] > 2 * max(blue[0], blue[1], 1)
    grey = picture[31, 8].astype(int)  # under the sphere, which is fully transparent
    assert np.ptp(grey) < 12
    assert grey.mean() > 80


def test_rays_show_the_scene(scene) -> None:
    renderer = make_renderer(*scene[:1], 40, 40, "rays")
    assert renderer.name == RAYS
    check_picture(renderer.render(scene[1], "top"))


def test_gl_shows_the_scene_and_agrees_with_rays(scene) -> None:
    model, data = scene
    renderer = gl_or_skip(model, 40, 40)
    assert renderer.name == GL
    picture = renderer.render(data, "top")
    check_picture(picture)
    cast = make_renderer(model, 40, 40, "rays").render(data, "top")
    coloured = [(np.ptp(p.astype(int), axis=2) > 60) for p in (picture, cast)]
    assert (coloured[0] != coloured[1]).mean() < 0.05  # edges may differ by a pixel


def test_a_smaller_picture_of_the_same_view(scene) -> None:
    renderer = make_renderer(scene[0], 80, 80, "rays")
    assert renderer.render(scene[1], "top", 40, 20).shape == (40, 20, 3)


def test_auto_falls_back_to_rays_where_opengl_is_off(scene, monkeypatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "disable")
    assert make_renderer(scene[0], 40, 40).name == RAYS
    with pytest.raises(LibrobotError, match=r"renderer 'gl'.*apt-get install"):
        make_renderer(scene[0], 40, 40, "gl")


def test_unknown_names(scene) -> None:
    with pytest.raises(ValueError, match="backend"):
        make_renderer(scene[0], 40, 40, "vulkan")  # type: ignore[arg-type]
    with pytest.raises(LibrobotError, match=r"'side'.*'top'"):
        make_renderer(scene[0], 40, 40, "rays").render(scene[1], "side")
