from dataclasses import dataclass

# Red, green and blue of the materials; divided by 255 they are the linear albedo.
COLORS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}

# Radius of a sphere, radius and half the height of a cylinder, half the edge of a cube, in world units. i-CLEVR's
# objects measure 0.6; its cubes have rounded corners, which a slightly smaller sharp cube imitates.
HALF_SIZES = {"cube": 0.58, "sphere": 0.596, "cylinder": 0.591}


@dataclass(frozen=True)
class SceneObject:
    """One object, standing on the floor.

    Args:
        color: A name in `COLORS`.
        shape: A name in `HALF_SIZES`.
        x: Where its centre stands, in world units.
        y: See `x`.
        rotation: Turn about the vertical axis, in radians.
    """

    color: str
    shape: str
    x: float
    y: float
    rotation: float = 0.0

    @property
    def label(self) -> str:
        """The object's name among i-CLEVR's labels, such as `red cube`."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A camera that looks at the origin, lights that face it, and objects on a floor; lengths in world units, z up.

    Args:
        camera: Position of the camera.
        lights: Positions of the key light, the fill light and the back light.
        objects: The objects, in the order in which the images of a scene add them.
    """

    camera: tuple[float, float, float]
    lights: tuple[tuple[float, float, float], ...]
    objects: tuple[SceneObject, ...]
