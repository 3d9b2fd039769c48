"""The MuJoCo scene: a table, a five-joint arm with a gripper, and things to handle, all of primitives.

One model holds every object. An episode places those that it needs; the others stay parked out of sight.
"""

from __future__ import annotations

from librobot.sim.tabletop.kinematics import FOREARM, HAND, SHOULDER_HEIGHT, UPPER_ARM

COLOURS = {"red": "0.85 0.10 0.10 1", "green": "0.10 0.65 0.15 1", "blue": "0.10 0.25 0.90 1"}
CUBE_HALF = 0.022  # m
DISC_RADIUS = 0.050  # m
BUTTON_HEIGHT, BUTTON_TRAVEL = 0.038, 0.012  # m, top of a released cap, and how far it goes down
DRAWER_TRAVEL = 0.07  # m
RING_CENTRE = 0.076  # m, from the cabinet's centre to the handle's, drawer closed
GRIPPER_TRAVEL = 0.042  # m, of each finger
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll")
TIMESTEP = 0.005  # s
PARKED = 5.0  # m, where unused objects wait, behind the cameras


def _cubes() -> str:
    return "".join(
        f"""
    <body name="cube_{name}" pos="{PARKED} {i} {CUBE_HALF}"><freejoint name="cube_{name}"/>
      <geom type="box" size="{CUBE_HALF} {CUBE_HALF} {CUBE_HALF}" rgba="{rgba}" mass="0.06"
            friction="1.0 0.02 0.001" condim="4"/></body>"""
        for i, (name, rgba) in enumerate(COLOURS.items())
    )


def _discs() -> str:
    return "".join(
        f"""
    <body name="disc_{name}" pos="{PARKED} {i} 0">
      <geom type="cylinder" size="{DISC_RADIUS} 0.001" rgba="{rgba}" contype="0" conaffinity="0"/></body>"""
        for i, (name, rgba) in enumerate(COLOURS.items())
    )


def _buttons() -> str:
    cap = (BUTTON_HEIGHT - 0.014) / 2
    return "".join(
        f"""
    <body name="button_{name}" pos="{PARKED} {i} 0">
      <geom type="cylinder" size="0.032 0.007" pos="0 0 0.007" rgba="0.25 0.25 0.25 1"/>
      <body pos="0 0 {0.014 + cap}">
        <joint name="button_{name}" type="slide" axis="0 0 -1" range="0 {BUTTON_TRAVEL}" stiffness="60"
               damping="2" limited="true"/>
        <geom type="cylinder" size="0.023 {cap}" rgba="{rgba}" mass="0.02" contype="2" conaffinity="2"/>
      </body></body>"""
        for i, (name, rgba) in enumerate(COLOURS.items())
    )


def _drawer() -> str:
    """A cabinet and a drawer that slides along its x axis; the handle is a square ring in front of it."""
    return f"""
    <body name="drawer" pos="{PARKED} -2 0">
      <geom type="box" size="0.035 0.05 0.03" pos="0 0 0.03" rgba="0.55 0.38 0.22 1"/>
      <body name="drawer_front">
        <joint name="drawer" type="slide" axis="1 0 0" range="0 {DRAWER_TRAVEL}" damping="3"
               frictionloss="0.3" limited="true"/>
        <geom type="box" size="0.004 0.044 0.022" pos="0.040 0 0.026" rgba="0.85 0.70 0.45 1" mass="0.05"
              contype="2" conaffinity="2"/>
        <geom type="box" size="0.035 0.036 0.012" pos="0.004 0 0.020" rgba="0.70 0.55 0.35 1" mass="0.05"
              contype="0" conaffinity="0"/>
        <geom type="box" size="0.032 0.004 0.010" pos="{RING_CENTRE} 0.034 0.022" rgba="0.95 0.80 0.10 1"
              mass="0.01" contype="2" conaffinity="2"/>
        <geom type="box" size="0.032 0.004 0.010" pos="{RING_CENTRE} -0.034 0.022" rgba="0.95 0.80 0.10 1"
              mass="0.01" contype="2" conaffinity="2"/>
        <geom type="box" size="0.004 0.038 0.010" pos="{RING_CENTRE + 0.032} 0 0.022" rgba="0.95 0.80 0.10 1"
              mass="0.01" contype="2" conaffinity="2"/>
      </body></body>"""


def _finger(name: str, side: int) -> str:
    return f"""
            <body name="finger_{name}" pos="{HAND - 0.030} {side * 0.006} 0">
              <joint name="finger_{name}" type="slide" axis="0 {side} 0" range="0 {GRIPPER_TRAVEL}"
                     damping="8" armature="0.02" limited="true"/>
              <geom type="box" size="0.030 0.006 0.010" rgba="0.15 0.15 0.15 1" mass="0.02"
                    friction="1.6 0.05 0.001" condim="4" contype="3" conaffinity="3"/></body>"""


def _arm() -> str:
    joint = 'armature="0.02" damping="0.4"'
    skin = 'rgba="0.92 0.92 0.92 1" contype="0" conaffinity="0"'
    return f"""
    <body name="base">
      <geom type="cylinder" size="0.045 {SHOULDER_HEIGHT / 2}" pos="0 0 {SHOULDER_HEIGHT / 2}" {skin}
            mass="1"/>
      <body name="shoulder" pos="0 0 {SHOULDER_HEIGHT}" gravcomp="1">
        <joint name="shoulder_pan" axis="0 0 1" range="-2 2" {joint}/>
        <geom type="sphere" size="0.032" {skin} mass="0.1"/>
        <body name="upper_arm" gravcomp="1">
          <joint name="shoulder_lift" axis="0 -1 0" range="-1 3" {joint}/>
          <geom type="capsule" fromto="0 0 0 {UPPER_ARM} 0 0" size="0.018" {skin} mass="0.15"/>
          <body name="forearm" pos="{UPPER_ARM} 0 0" gravcomp="1">
            <joint name="elbow_flex" axis="0 -1 0" range="-3 0.5" {joint}/>
            <geom type="capsule" fromto="0 0 0 {FOREARM} 0 0" size="0.015" {skin} mass="0.12"/>
            <body name="wrist" pos="{FOREARM} 0 0" gravcomp="1">
              <joint name="wrist_flex" axis="0 -1 0" range="-3 2" {joint}/>
              <geom type="sphere" size="0.018" {skin} mass="0.05"/>
              <body name="hand" gravcomp="1">
          <joint name="wrist_roll" axis="1 0 0" range="-3 3" {joint}/>
          <geom type="capsule" fromto="0 0 0 {HAND - 0.075} 0 0" size="0.013" {skin} mass="0.05"/>
          <geom type="box" size="0.008 0.046 0.012" pos="{HAND - 0.067} 0 0" rgba="0.95 0.6 0.1 1" mass="0.03"
                contype="0" conaffinity="0"/>
          <site name="tip" pos="{HAND} 0 0" size="0.004" rgba="0 0 0 0"/>
          <camera name="wrist" pos="{HAND - 0.095} 0 0.065" xyaxes="0 -1 0 0.30 0 0.95" fovy="70"/>
          {_finger("left", 1)}{_finger("right", -1)}
              </body></body></body></body></body></body>"""


def scene_xml() -> str:
    """The model as MJCF. Distances in m, angles in rad, masses in kg."""
    actuators = "".join(
        f'<position name="{name}" joint="{name}" kp="60" dampratio="1" forcerange="-12 12"/>'
        for name in JOINTS
    )
    return f"""
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual><headlight ambient="0.35 0.35 0.35" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
    <map znear="0.01" zfar="20"/></visual>
  <worldbody>
    <light pos="0.3 0.2 1.5" dir="-0.15 -0.1 -1" directional="true" diffuse="0.45 0.45 0.45"
           specular="0 0 0"/>
    <camera name="front" pos="0.62 0 0.50" xyaxes="0 1 0 -0.82 0 0.574" fovy="36"/>
    <camera name="video" pos="0.85 0.32 0.50" xyaxes="-0.453 0.892 0 -0.479 -0.243 0.844" fovy="42"/>
    <geom name="table" type="plane" size="0 0 1" rgba="0.80 0.78 0.74 1" friction="0.6 0.005 0.0001"
          contype="3" conaffinity="3"/>
    {_arm()}{_discs()}{_buttons()}{_drawer()}{_cubes()}
  </worldbody>
  <equality>
    <joint joint1="finger_right" joint2="finger_left" polycoef="0 1 0 0 0" solref="0.004 1"/>
  </equality>
  <actuator>{actuators}
    <position name="gripper" joint="finger_left" kp="400" kv="12" forcerange="-12 12"/>
  </actuator>
</mujoco>"""
