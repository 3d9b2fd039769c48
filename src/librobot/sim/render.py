"""Pictures of a MuJoCo scene, by OpenGL where a context opens and by ray casting everywhere else.

Both back ends sit behind `make_renderer`, which says which one it took (`Renderer.name`). They give
different pixels, so the name is stored with datasets and checkpoints.

OpenGL is used with the shadow map and multisampling off: a stock MuJoCo context spends most of its time
filling a 4096 x 4096 shadow map. Ray casting uses `mj_multiRay` and needs no library beside MuJoCo: one ray
per pixel, the colour of the geom that it hits, shaded by the angle to a light (Lambert).
"""

from __future__ import annotations

import atexit
import os
import weakref
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from librobot.errors import LibrobotError

if TYPE_CHECKING:
    import mujoco

Backend = Literal["auto", "gl", "rays"]
GL, RAYS = "mujoco-gl", "mujoco-rays"

_SKY = np.array([0.55, 0.65, 0.75], dtype=np.float32)
_LIGHT_DIRECTION = np.array([0.25, 0.15, 1.0]) / np.linalg.norm([0.25, 0.15, 1.0])
_AMBIENT, _DIFFUSE = 0.45, 0.55


class Renderer(Protocol):
    """Renders any camera of one model."""

    name: str

    def render(
        self, data: mujoco.MjData, camera: str, height: int | None = None, width: int | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The camera's picture; `height` and `width` may be smaller than the renderer's own."""

    def close(self) -> None:
        """Free the context."""


def make_renderer(model: mujoco.MjModel, height: int, width: int, backend: Backend = "auto") -> Renderer:
    """A renderer of pictures up to `height` x `width` pixels.

    Raises `LibrobotError` where `backend="gl"` and no OpenGL context opens.
    """
    if backend not in ("auto", "gl", "rays"):
        raise ValueError(f"backend must be 'auto', 'gl' or 'rays', found {backend!r}")
    if backend == "rays":
        return RayRenderer(model, height, width)
    try:
        return GLRenderer(model, height, width)
    except Exception as error:  # a missing library, driver or display: each raises its own type
        if backend == "gl":
            raise LibrobotError(
                f"renderer 'gl': no OpenGL context opens here ({type(error).__name__}: {error}); install EGL "
                "(Debian: apt-get install libegl1 libgl1) or choose env.renderer=rays, which needs no library"
            ) from error
        return RayRenderer(model, height, width)


def _gl_context_class() -> type:
    """The off-screen context that MUJOCO_GL names, EGL by default."""
    choice = os.environ.get("MUJOCO_GL", "").lower().strip() or "egl"
    if choice == "egl":
        from mujoco.egl import GLContext
    elif choice == "osmesa":
        from mujoco.osmesa import GLContext
    elif choice in ("glfw", "glx"):
        from mujoco.glfw import GLContext
    else:
        raise RuntimeError(f"MUJOCO_GL={choice} turns OpenGL off")
    return GLContext


class GLRenderer:
    """MuJoCo's own OpenGL renderer with shadows, reflections and multisampling off."""

    name = GL

    def __init__(self, model: mujoco.MjModel, height: int, width: int) -> None:
        import mujoco

        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        self._size = (height, width)
        self._model = model
        self._gl = None  # so that close() is safe if the next line raises
        self._gl = _gl_context_class()(width, height)
        _close_at_exit(self)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW.value] = 0
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION.value] = 0
        self._option = mujoco.MjvOption()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(
        self, data: mujoco.MjData, camera: str, height: int | None = None, width: int | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        import mujoco

        height, width = height or self._size[0], width or self._size[1]
        assert self._gl is not None, "this renderer is closed"
        self._gl.make_current()
        self._camera.fixedcamid = _camera_id(self._model, camera)
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, data, self._option, None, self._camera, everything, self._scene)
        rectangle = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rectangle, self._scene, self._context)
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, rectangle, self._context)
        return np.ascontiguousarray(pixels[::-1])  # OpenGL counts rows from the bottom

    def close(self) -> None:
        if self._gl is not None:
            self._gl.free()
            self._gl = None

    def __del__(self) -> None:
        self.close()


def _close_at_exit(renderer: GLRenderer) -> None:
    """Free the context before MuJoCo's own exit handler closes the display under it."""
    reference = weakref.ref(renderer)

    def close() -> None:
        if (alive := reference()) is not None:
            alive.close()

    atexit.register(close)


class RayRenderer:
    """One `mj_multiRay` call per picture: flat colours and Lambert shading, no OpenGL."""

    name = RAYS

    def __init__(self, model: mujoco.MjModel, height: int, width: int) -> None:
        self._model = model
        self._size = (height, width)
        self._directions: dict[tuple[int, int, int], Float[np.ndarray, "p 3"]] = {}
        self._colours = self._geom_colours()
        self._visible_groups = np.array([1, 1, 1, 0, 0, 0], dtype=np.uint8)  # as MjvOption's default

    def _geom_colours(self) -> Float[np.ndarray, "g 3"]:
        """Colour of each geom (its material's where it has one), the sky's in the last row (geom id -1)."""
        rgba = self._model.geom_rgba.copy()
        has_material = self._model.geom_matid >= 0
        rgba[has_material] = self._model.mat_rgba[self._model.geom_matid[has_material]]
        return np.concatenate([rgba[:, :3], _SKY[None]]).astype(np.float32)

    def _rays(self, camera: int, height: int, width: int) -> Float[np.ndarray, "p 3"]:
        """Unit vectors through the pixels' centres, in the camera's frame (it looks along -z)."""
        key = (camera, height, width)
        if key not in self._directions:
            half = np.tan(np.deg2rad(self._model.cam_fovy[camera]) / 2)
            up = half * (1 - (2 * np.arange(height) + 1) / height)
            right = half * ((2 * np.arange(width) + 1) / width - 1) * width / height
            grid = np.stack(np.broadcast_arrays(right[None, :], up[:, None], -1.0), axis=-1).reshape(-1, 3)
            self._directions[key] = grid / np.linalg.norm(grid, axis=1, keepdims=True)
        return self._directions[key]

    def render(
        self, data: mujoco.MjData, camera: str, height: int | None = None, width: int | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        import mujoco

        height, width = height or self._size[0], width or self._size[1]
        number = _camera_id(self._model, camera)
        rotation = data.cam_xmat[number].reshape(3, 3)
        rays = np.ascontiguousarray(self._rays(number, height, width) @ rotation.T)
        count = len(rays)
        geom = np.empty(count, dtype=np.int32)
        distance = np.empty(count)
        normal = np.empty(3 * count)
        mujoco.mj_multiRay(
            self._model, data, data.cam_xpos[number], rays.reshape(-1), self._visible_groups,
            1, -1, geom, distance, normal, count, mujoco.mjMAXVAL,
        )  # fmt: skip
        cosine = np.abs(normal.reshape(-1, 3) @ _LIGHT_DIRECTION)
        shade = np.where(geom >= 0, _AMBIENT + _DIFFUSE * cosine, 1.0).astype(np.float32)
        pixels = self._colours[geom] * (255 * shade)[:, None]
        return np.clip(pixels, 0, 255).astype(np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        self._directions.clear()


def _camera_id(model: mujoco.MjModel, camera: str) -> int:
    import mujoco

    number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
    if number < 0:
        names = [model.camera(i).name for i in range(model.ncam)]
        raise LibrobotError(f"camera {camera!r} is not in the scene, which has {names}")
    return number
