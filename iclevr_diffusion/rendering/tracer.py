"""Draws scenes in the way of CLEVR's Blender files, by a ray tracer of NumPy arrays.

Vectors are float32 arrays (3, N), one column a point or a direction; `_column` makes one from three numbers. Constants
that no comment explains come from the scene files of *CLEVR: A Diagnostic Dataset for Compositional Language and
Elementary Visual Reasoning* (Johnson et al., 2017, https://arxiv.org/abs/1612.06890); those called fitted were chosen
so that images drawn here differ least from Blender's or from i-CLEVR's. Light that was reflected more than once is not
traced but approximated by such fitted terms.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from iclevr_diffusion.rendering.scene import COLORS, HALF_SIZES, Scene, SceneObject

# Tangents of half the horizontal and half the vertical field of view: a frame of 4:3, shot into square images.
TAN_X, TAN_Y = 16 / 35, 12 / 35

# Three square lamps, which face the origin, and the sun. An intensity is the irradiance at distance 1.
LAMP_INTENSITIES = (25.0, 7.5, 12.5)
LAMP_SIDES = (0.5, 0.5, 1.0)
SUN_DIRECTION = np.array([[0.405], [-0.192], [0.894]], np.float32)
SUN_IRRADIANCE, SUN_HALF_ANGLE = 0.45, 0.0997
LIGHT_COLORS = np.array([[1, 0.932, 0.817], [0.762, 0.818, 1], [1, 1, 1], [1, 1, 1]], np.float32)[:, :, None]

# The floor is flat near the origin and bends up to a wall: its height is a function of a coordinate u along the floor.
FLOOR_ALBEDO = 0.8
WALL_X, WALL_Y, WALL_START = -0.90342, 0.42876, -14.0228
WALL = np.array(
    [
        (-24, 0), (-15, 0.003), (-12, 0.014), (-10, 0.032), (-8, 0.068), (-6, 0.143), (-5, 0.207), (-4, 0.301),
        (-3, 0.441), (-2, 0.656), (-1, 1.005), (-0.5, 1.261), (0, 1.604), (0.5, 2.077), (1, 2.749), (1.5, 3.745),
        (2, 5.286), (2.5, 7.72), (3, 11.413), (3.5, 16.375), (4.05, 22.83),
    ]
).T  # fmt: skip
WALL_SLOPES = np.gradient(WALL[1], WALL[0])

# Radius of the ball around an object of half size 1. That of the cube cuts off its corners, which lie at 1.73: it is
# how CLEVR's rounded cube is imitated (fitted).
BOUNDING_RADII = {"cube": 1.58, "sphere": 1.0, "cylinder": 2**0.5}

# Where a pixel is sampled, as offsets from its centre in pixels, and how much each sample counts. i-CLEVR's images of
# 320x240 are resized to 64x64 without a filter, so that its edges are sharper than pixels filtered over their whole
# area would show them, most of all across columns (fitted).
COLUMN_OFFSETS, COLUMN_WEIGHTS = np.array([-0.05, 0.05], np.float32), np.array([0.5, 0.5], np.float32)
ROW_OFFSETS, ROW_WEIGHTS = np.array([-0.2, 0, 0.2], np.float32), np.array([0.25, 0.5, 0.25], np.float32)


def render_scene(scene: Scene, size: int = 64) -> np.ndarray:
    """Draws a scene with all its objects: uint8 (size, size, 3)."""
    return next(render_sequence(scene, [len(scene.objects)], size))


def render_sequence(scene: Scene, num_objects: Sequence[int], size: int = 64) -> Iterator[np.ndarray]:
    """Draws a scene as it grows; this takes less time than to draw each image by itself.

    Args:
        scene: The scene.
        num_objects: For each image how many of the scene's objects it shows, in rising order.
        size: Height and width of the images in pixels.

    Yields:
        The images, each uint8 (size, size, 3).
    """
    objects = scene.objects[: max(num_objects)]
    camera, lights = _Camera(scene.camera), _Lights(scene.lights)
    hits = [_Hits(camera, object_, size) for object_ in objects]
    floor = _Floor(camera, lights, hits, size)
    grain = _grain(size)
    solids = []
    for count in range(len(objects) + 1):
        if count:
            newest = objects[count - 1]
            for surface in (floor, *solids):
                lights.cast_shadow(newest, surface.points, surface.blocked)
            floor.reflect_from(newest)
            solids.append(_Solid(lights, newest, hits[count - 1]))
            for earlier in objects[: count - 1]:
                lights.cast_shadow(earlier, solids[-1].points, solids[-1].blocked)
        if count in num_objects:
            owner = _owners(hits[:count], size)
            parts = [floor.samples(owner), *(solid.samples(owner == i) for i, solid in enumerate(solids))]
            pixel, weight, color = (np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
            image = np.stack([np.bincount(pixel, weight * channel, size * size) for channel in color], axis=-1)
            image = image.reshape(size, size, 3) * grain
            yield (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def visible_pixels(scene: Scene, num_objects: int | None = None, size: int = 64) -> list[float]:
    """Measures how many pixels of an image of `size` each of the first `num_objects` objects (all if None) covers."""
    camera = _Camera(scene.camera)
    hits = [_Hits(camera, object_, size) for object_ in scene.objects[:num_objects]]
    owner, weights = _owners(hits, size), _sample_weights(size)
    return [round(float(weights[owner == i].sum()), 2) for i in range(len(hits))]


class _Camera:
    def __init__(self, position: Sequence[float]) -> None:
        self.position = _column(position)
        self.forward = -_unit(self.position)
        self.right, self.up = _perpendicular(self.forward)

    def rays(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Directions (3, N) through points of the image, given from -1 at its left and upper edge to 1."""
        return self.forward + np.float32(TAN_X) * x * self.right - np.float32(TAN_Y) * y * self.up


class _Lights:
    """The lamps and the sun, each as a point for its brightness and as nine points for the edges of its shadows."""

    def __init__(self, positions: Sequence[Sequence[float]]) -> None:
        self.positions = [_column(position) for position in positions]
        grid = np.array([-1 / 3, 0, 1 / 3], np.float32)
        self.samples = []
        for position, side in zip(self.positions, LAMP_SIDES, strict=True):
            right, up = _perpendicular(_unit(position))
            self.samples.append(position + side * (np.tile(grid, 3) * right + np.repeat(grid, 3) * up))
        # A disk far away, filled evenly by a spiral of golden angles.
        index = np.arange(9, dtype=np.float32)
        radius, angle = SUN_HALF_ANGLE * np.sqrt((index + 0.5) / 9), 2.39996 * index
        right, up = _perpendicular(SUN_DIRECTION)
        self.samples.append(100 * (SUN_DIRECTION + radius * (np.cos(angle) * right + np.sin(angle) * up)))

    def irradiance(self, points: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Irradiance (4, N) of each light where nothing is in its way, and the directions to the lights."""
        irradiance, directions = [], []
        for position, intensity in zip(self.positions, LAMP_INTENSITIES, strict=True):
            offset = position - points
            squared_distance = _dot(offset, offset)
            direction = offset / np.sqrt(squared_distance)
            cosines = np.maximum(_dot(direction, normals), 0) * np.maximum(_dot(direction, _unit(position)), 0)
            irradiance.append(intensity * cosines / squared_distance)
            directions.append(direction)
        irradiance.append(SUN_IRRADIANCE * np.maximum(_dot(SUN_DIRECTION, normals), 0))
        directions.append(SUN_DIRECTION)
        return np.stack(irradiance), directions

    def cast_shadow(self, object_: SceneObject, points: np.ndarray, blocked: np.ndarray) -> None:
        """Sets in `blocked` (4, 9, N) the light points that the object hides from `points`."""
        bound = HALF_SIZES[object_.shape] * BOUNDING_RADII[object_.shape]
        points = _to_object(object_, points)
        squared_distance = _dot(points, points)
        for samples, side, hidden in zip(self.samples, (*LAMP_SIDES, None), blocked, strict=True):
            samples = _to_object(object_, samples)
            direction = samples.mean(axis=1, keepdims=True) - points
            length = np.sqrt(_dot(direction, direction))
            along = -_dot(points, direction) / length
            spread = SUN_HALF_ANGLE if side is None else 0.71 * side / length
            reach = bound + spread * np.sqrt(squared_distance)
            # Only these rays come near the object.
            near = np.flatnonzero((squared_distance - along**2 < reach**2) & (along > -bound))
            if len(near):
                start = points[:, None, near]
                enter, leave = _crossing(object_.shape, start, samples[:, :, None] - start)
                hidden[:, near] |= (enter < leave) & (leave > 0) & (enter < 1)


class _Hits:
    """The samples of an image at which a ray meets an object, whatever stands before it."""

    def __init__(self, camera: _Camera, object_: SceneObject, size: int) -> None:
        half_size = HALF_SIZES[object_.shape]
        center = _column((object_.x, object_.y, half_size)) - camera.position
        bound = half_size * BOUNDING_RADII[object_.shape]
        x, y = _sample_positions(size)
        depth = _dot(camera.forward, center)[0]

        def span(offset: np.ndarray, tangent: float, positions: np.ndarray) -> np.ndarray:
            middle, half = np.arctan2(offset[0], depth), np.arcsin(bound / np.hypot(offset[0], depth))
            low, high = np.tan(middle - half) / tangent, np.tan(middle + half) / tangent
            return np.flatnonzero((positions > low) & (positions < high))

        columns = span(_dot(camera.right, center), TAN_X, x)
        rows = span(-_dot(camera.up, center), TAN_Y, y)
        rows, columns = np.repeat(rows, len(columns)), np.tile(columns, len(rows))
        rays = camera.rays(x[columns], y[rows])
        enter, leave = _crossing(object_.shape, _to_object(object_, camera.position), _turn(rays, -object_.rotation))
        hit = enter < leave
        self.distance = enter[hit]
        self.points = camera.position + enter[hit] * rays[:, hit]
        self.view = -_unit(rays[:, hit])
        self.sample = rows[hit] * len(x) + columns[hit]  # index into the samples of the whole image
        self.pixel = _sample_pixels(size)[self.sample]
        self.weight = _sample_weights(size)[self.sample]


class _Solid:
    """The surface of an object that the camera sees: matte, under a thin clear coat that mirrors a little."""

    def __init__(self, lights: _Lights, object_: SceneObject, hits: _Hits) -> None:
        self.hits, self.points = hits, hits.points
        self.blocked = np.zeros((4, 9, self.points.shape[1]), bool)
        normals = _turn(_local_normals(object_.shape, _to_object(object_, self.points)), object_.rotation)
        self.irradiance, directions = lights.irradiance(self.points, normals)
        facing = np.clip(_dot(normals, hits.view), 0.02, 1)
        coat, base = _fresnel(1.2, facing), _fresnel(1.4, facing)
        albedo = 0.963 * _column(COLORS[object_.color]) / 255  # all factors of this class are fitted
        self.diffuse = (1 - coat) * (1 - 0.23 * base) * albedo / np.pi

        roughness = 0.303
        highlights = []
        for direction in directions:  # Beckmann's distribution of microfacets
            squared_cosine = np.maximum(_dot(_unit(direction + hits.view), normals), 1e-3) ** 2
            density = np.exp((1 - 1 / squared_cosine) / roughness**2) / (np.pi * roughness**2 * squared_cosine**2)
            highlights.append(0.64 * coat * density / (4 * np.maximum(_dot(direction, normals), 0.05) * facing))
        self.highlights = np.stack(highlights) * self.irradiance

        # Light from the floor, as bright as it is at the object's foot.
        foot, up = _column((object_.x, object_.y, 0)), _column((0, 0, 1))
        floor = FLOOR_ALBEDO * _color(lights.irradiance(foot, up)[0])
        self.bounced = 0.926 * floor * (1 - normals[2]) / 2
        self.mirrored = 0.416 * coat * floor / np.pi

    def samples(self, owned: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixel, weight and encoded colour (3, N) of the samples that are set in `owned`."""
        seen = owned[self.hits.sample]
        unblocked = 1 - self.blocked[:, :, seen].mean(axis=1, dtype=np.float32)
        irradiance = _color(self.irradiance[:, seen] * unblocked) + self.bounced[:, seen]
        mirrored = _color(self.highlights[:, seen] * unblocked) + self.mirrored[:, seen]
        return self.hits.pixel[seen], self.hits.weight[seen], _encode(self.diffuse[:, seen] * irradiance + mirrored)


class _Floor:
    """Floor and wall: one sample a pixel, and all samples where an object covers a part of a pixel or all of it."""

    def __init__(self, camera: _Camera, lights: _Lights, hits: Sequence[_Hits], size: int) -> None:
        covered = np.zeros(size * size, bool)
        for object_hits in hits:
            covered[object_hits.pixel] = True
        x, y = _sample_positions(size)
        center = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1
        whole, self.sample = np.flatnonzero(~covered), np.flatnonzero(covered[_sample_pixels(size)])
        self.pixel = np.concatenate([whole, _sample_pixels(size)[self.sample]])
        self.weight = np.concatenate([np.ones(len(whole), np.float32), _sample_weights(size)[self.sample]])
        rays = camera.rays(
            np.concatenate([center[whole % size], x[self.sample % len(x)]]),
            np.concatenate([center[whole // size], y[self.sample // len(x)]]),
        )
        self.points, normals = self._meet(camera, rays)
        self.irradiance, _ = lights.irradiance(self.points, normals)
        self.blocked = np.zeros((4, 9, self.points.shape[1]), bool)
        # Light from the wall, which is nearer far out (fitted).
        self.bounced = 0.039 + 0.04 * np.clip((np.sqrt(_dot(self.points, self.points)) - 2.5) / 5.5, 0, 1)

    @staticmethod
    def _meet(camera: _Camera, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points where rays from the camera meet the floor or the wall, and the normals there."""
        u_start = WALL_X * camera.position[0] + WALL_Y * camera.position[1] + WALL_START
        u_speed = WALL_X * rays[0] + WALL_Y * rays[1]
        with np.errstate(divide="ignore"):
            distance = np.where(rays[2] < 0, -camera.position[2] / rays[2], np.inf)
            distance = np.minimum(distance, np.where(u_speed > 0, (2 - u_start) / u_speed, np.inf))
        for _ in range(5):  # Newton's method
            u = u_start + distance * u_speed
            height = camera.position[2] + distance * rays[2] - np.interp(u, *WALL)
            distance = distance - height / (rays[2] - np.interp(u, WALL[0], WALL_SLOPES) * u_speed)
        slope = np.interp(u_start + distance * u_speed, WALL[0], WALL_SLOPES).astype(np.float32)
        normals = _unit(np.stack([np.float32(-WALL_X) * slope, np.float32(-WALL_Y) * slope, np.ones_like(slope)]))
        return camera.position + distance.astype(np.float32) * rays, normals

    def reflect_from(self, object_: SceneObject) -> None:
        """Adds the light that an object's lower part throws on the floor around it (fitted)."""
        offset = _to_object(object_, self.points) / HALF_SIZES[object_.shape]
        if object_.shape == "sphere":
            squared = offset[0] ** 2 + offset[1] ** 2
            strength = 1.545 * squared / (1 + squared) ** 3  # none at the point of contact, which lies in the dark
        else:
            if object_.shape == "cube":
                gap = np.hypot(*np.maximum(np.abs(offset[:2]) - 1, 0))
            else:
                gap = np.maximum(np.hypot(offset[0], offset[1]) - 1, 0)
            strength = 0.182 / (1 + (gap / 1.35) ** 2) ** 2
        self.bounced = self.bounced + strength * _column(COLORS[object_.color]) / 255

    def samples(self, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixel, weight and encoded colour (3, N) of all samples; none counts where an object is before it."""
        weight = self.weight.copy()
        weight[len(weight) - len(self.sample) :] *= owner[self.sample] < 0
        unblocked = 1 - self.blocked.mean(axis=1, dtype=np.float32)
        radiance = FLOOR_ALBEDO / np.pi * (_color(self.irradiance * unblocked) + self.bounced)
        return self.pixel, weight, _encode(radiance)


def _column(values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float32).reshape(3, 1)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(_dot(vectors, vectors))


def _perpendicular(forward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The level and the upright unit vector at right angles to a unit vector (3, 1)."""
    right = _unit(np.stack([forward[1], -forward[0], np.zeros_like(forward[0])]))
    return right, np.cross(right, forward, axis=0)


def _turn(vectors: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.stack([cosine * vectors[0] - sine * vectors[1], sine * vectors[0] + cosine * vectors[1], vectors[2]])


def _to_object(object_: SceneObject, points: np.ndarray) -> np.ndarray:
    """Points as seen from the object's centre, turned with it."""
    return _turn(points - _column((object_.x, object_.y, HALF_SIZES[object_.shape])), -object_.rotation)


def _crossing(shape: str, start: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For rays `start` + t `direction` around an object at the origin, the t at which they enter and leave it.

    A ray that misses has no t (NaN) at which it enters, or one that is larger than that at which it leaves.
    """
    half_size = np.float32(HALF_SIZES[shape])
    radius = half_size * np.float32(BOUNDING_RADII[shape] if shape == "cube" else 1)
    round_axes = slice(0, 2 if shape == "cylinder" else 3)
    o, d = start[round_axes], direction[round_axes]
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b, c = (d * d).sum(axis=0), (o * d).sum(axis=0), (o * o).sum(axis=0) - radius**2
        root = np.sqrt(b * b - a * c)
        enter, leave = (-b - root) / a, (-b + root) / a
        flat_axes = {"cube": slice(0, 3), "cylinder": slice(2, 3), "sphere": slice(0, 0)}[shape]
        for o, d in zip(start[flat_axes], direction[flat_axes], strict=True):
            first, second = (-half_size - o) / d, (half_size - o) / d
            enter = np.maximum(enter, np.minimum(first, second))
            leave = np.minimum(leave, np.maximum(first, second))
    return enter, leave


def _local_normals(shape: str, points: np.ndarray) -> np.ndarray:
    """Normals at points on the surface of an object at the origin."""
    points = points / HALF_SIZES[shape]
    if shape == "cube":  # its normals turn smoothly near the edges, as those of CLEVR's bevelled cube do (fitted)
        return _unit(np.sign(points) * np.maximum(np.abs(points) - 0.752, 0) ** 2)
    if shape == "cylinder":
        cap = np.abs(points[2]) > np.hypot(points[0], points[1])
        points = np.where(cap, np.float32([[0], [0], [1]]), np.float32([[1], [1], [0]])) * points
    return _unit(points)


def _fresnel(index: float, cosine: np.ndarray) -> np.ndarray:
    """Part of unpolarised light that a clear material of this refractive index reflects."""
    g = np.sqrt(index * index - 1 + cosine * cosine)
    ratio = (cosine * (g + cosine) - 1) / (cosine * (g - cosine) + 1)
    return 0.5 * ((g - cosine) / (g + cosine)) ** 2 * (1 + ratio**2)


def _color(irradiance: np.ndarray) -> np.ndarray:
    """Red, green and blue (3, N) of the lights' sum from what each light (4, N) gives."""
    return (irradiance[:, None] * LIGHT_COLORS).sum(axis=0)


def _encode(radiance: np.ndarray) -> np.ndarray:
    """Linear light to sRGB."""
    curve = 1.055 * np.maximum(radiance, 0.0031308) ** np.float32(1 / 2.4) - 0.055
    return np.where(radiance < 0.0031308, 12.92 * radiance, curve)


def _sample_positions(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of all samples of an image, from -1 to 1."""
    center = np.arange(size, dtype=np.float32)[:, None] + 0.5
    x, y = (center + COLUMN_OFFSETS).ravel(), (center + ROW_OFFSETS).ravel()
    return x * np.float32(2 / size) - 1, y * np.float32(2 / size) - 1


def _sample_pixels(size: int) -> np.ndarray:
    row, column = np.arange(size).repeat(len(ROW_OFFSETS)), np.arange(size).repeat(len(COLUMN_OFFSETS))
    return (row[:, None] * size + column).ravel()


def _sample_weights(size: int) -> np.ndarray:
    return (np.tile(ROW_WEIGHTS, size)[:, None] * np.tile(COLUMN_WEIGHTS, size)).ravel()


def _owners(hits: Sequence[_Hits], size: int) -> np.ndarray:
    """For every sample of an image the index of the object that it shows, -1 for the floor."""
    nearest = np.full(size * size * len(ROW_OFFSETS) * len(COLUMN_OFFSETS), np.inf, np.float32)
    owner = np.full(len(nearest), -1)
    for index, object_hits in enumerate(hits):
        closer = object_hits.distance < nearest[object_hits.sample]
        nearest[object_hits.sample[closer]] = object_hits.distance[closer]
        owner[object_hits.sample[closer]] = index
    return owner


def _grain(size: int) -> np.ndarray:
    """A factor for each pixel (size, size, 1), the same in all images: Blender's noise, which i-CLEVR repeats so."""
    row = (np.arange(size) + 0.5) / size
    deviation = np.interp(row, (0.5, 0.65), (0.016, 0.0075))  # measured on the floor of i-CLEVR's mean image
    return (1 + deviation[:, None] * np.random.default_rng(size).standard_normal((size, size)))[:, :, None]
