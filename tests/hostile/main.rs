//! What an enemy, or a broken client, can send to the native listener: the broker answers with an error or closes, its memory stays bounded, and
//! others are served meanwhile.

mod auth;
mod garbage;
mod limits;
mod verbs;
#[path = "../native/world.rs"]
mod world;
