"""The carrier of the engine kvm-in-bochs: Debian's kernel and QEMU as one memory image that Bochs starts.

It is made of Debian's packages, on this machine, without root and with nothing installed:

- `packages`, `tools`: which packages, by the host's own apt; downloaded and unpacked into the cache;
- `kernel`: the kernel out of its bzImage; `modules`: KVM's modules, made cheap to load;
- `libraries`: what QEMU's binary needs; `archive`, `initramfs`: the file system that holds all of it;
- `start_info`: what the kernel is told at its PVH entry;
- `image`: all of it together, and `store`: the folder where what was built is kept.
"""
