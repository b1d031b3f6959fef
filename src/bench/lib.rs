//! Load generator that speaks Tombolo's and etcd's API.
