"""What the guest image is made of: Debian packages, a few configuration files, and the script that finishes it.

The same root file system is the guest of every microVM and the machine (docs/architecture.md), so it also holds what
is needed to run microVMs. Everything here goes into the image's key: change it, and setup builds another image.
"""

import shlex

VERSION = 2  # raise it when the same inputs shall give another image

PACKAGES = (
    "aardvark-dns",
    "btrfs-progs",
    "busybox-static",
    "ca-certificates",
    "conmon",
    "crun",
    "e2fsprogs",
    "erofs-utils",
    "fuse3",
    "iproute2",
    "kmod",
    "libnftables1",
    "netavark",
    "nftables",
    "podman",
    "procps",
    "python3",
    "skopeo",
    "slirp4netns",
    "uidmap",
    "zstd",
)

# Never unpacked: nobody reads documentation in a guest.
EXCLUDED = tuple(
    f"/usr/share/{name}/*"
    for name in ("bash-completion", "bug", "doc", "doc-base", "fish", "info", "lintian", "locale", "man", "zsh")
)

# Where things are mounted; a read-only image cannot get them later.
DIRECTORIES = ("scratch", "images", "host", "var/lib/containers")

FILES = {
    "etc/hostname": "fcvm\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    "etc/resolv.conf": "",
    "etc/machine-id": "",
    # No systemd: Podman manages cgroups itself and logs to files.
    "etc/containers/containers.conf": """\
[containers]
log_driver = "k8s-file"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"

[network]
network_backend = "netavark"
""",
    # The image disk is an additional, read-only store.
    "etc/containers/storage.conf": """\
[storage]
driver = "overlay"
graphroot = "/var/lib/containers/storage"
runroot = "/run/containers/storage"

[storage.options]
additionalimagestores = ["/images"]
""",
    # The host decides which images a guest gets; it has verified them.
    "etc/containers/policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}\n',
}

# Programs that the host takes out of the image, with their libraries and loader: the host's own may be too old
# (mkfs.erofs) or of another version than the guest's (python3).
TOOLS = ("/usr/bin/mkfs.erofs", "/usr/bin/python3")

# Directories of kernel modules for hardware that no VM of ours has.
NO_MODULES = """
drivers/ata drivers/cdrom drivers/comedi drivers/cxl drivers/hid drivers/hv drivers/hwtracing drivers/infiniband drivers/input
drivers/leds drivers/media drivers/mfd drivers/net/ethernet drivers/net/hyperv drivers/net/vmxnet3 drivers/net/wwan
drivers/nvdimm drivers/nvme drivers/platform drivers/power drivers/powercap drivers/scsi drivers/soundwire drivers/target
drivers/tee drivers/thermal drivers/video drivers/watchdog drivers/xen sound
"""

# Directories of modules that are stored uncompressed: unpacking them costs more than reading, under emulation seconds.
PLAIN_MODULES = """
arch crypto drivers/block drivers/char drivers/crypto drivers/firmware drivers/net drivers/ptp drivers/vhost drivers/virtio
fs/btrfs fs/erofs fs/overlayfs lib net/802 net/8021q net/bridge net/core net/ipv4 net/ipv6 net/llc net/netfilter net/packet
net/vmw_vsock virt
"""

KERNEL_PACKAGE = "linux-image-cloud-{arch}"

# Run by mmdebstrap outside of the chroot, which is $1, with apt's configuration for it. Leaves in $1/tmp/fcvm: the
# kernel (vmlinuz, config, modules.tar), tools.tar and the list of packages. The kernel package is unpacked and not
# installed, as its scripts would want to build an initramfs.
SCRIPT = """\
set -eu
root=$1
out=$root/tmp/fcvm
mkdir -p "$out/kernel" "$out/tools"
cd "$out"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"

package=$(apt-cache depends {kernel_package} | sed -n 's/^ *Depends: \\(linux-image-[0-9][^ ]*\\)$/\\1/p' | head -n 1)
[ -n "$package" ] || {{ echo "E: {kernel_package} depends on no kernel" >&2; exit 1; }}
apt-get -q -o APT::Sandbox::User=root download "$package"
dpkg-deb -x "$package"_*.deb kernel
rm "$package"_*.deb
[ -d kernel/usr/lib/modules ] || {{ mkdir -p kernel/usr/lib; mv kernel/lib/modules kernel/usr/lib/; }}
version=$(ls kernel/usr/lib/modules)
mkdir -p "$root/usr/lib/modules"
mv "kernel/usr/lib/modules/$version" "$root/usr/lib/modules/"
(
    cd "$root/usr/lib/modules/$version/kernel"
    rm -rf {no_modules}
    find {plain_modules} -name '*.ko.xz' -print 2>/dev/null | sed "s|^|/usr/lib/modules/$version/kernel/|" >"$out/plain" || true
)
xargs chroot "$root" busybox unxz <plain
rm plain
chroot "$root" depmod "$version"
mv "kernel/boot/vmlinuz-$version" vmlinuz
mv "kernel/boot/config-$version" config
rm -r kernel
tar -C "$root/usr/lib/modules" -cf modules.tar "$version"

for tool in {tools}; do
    cp -L "$root$tool" tools/
    for library in $(chroot "$root" ldd "$tool" | sed -n 's/.*[[:space:]]\\(\\/[^ ]*\\) (0x.*/\\1/p'); do
        cp -L "$root$library" tools/
    done
done
cp -L "$root/bin/busybox" tools/
library=$(chroot "$root" python3 -c 'import encodings, os; print(os.path.dirname(encodings.__path__[0]))')
mkdir -p "tools/pyhome/${{library#/usr/}}"
cp -r "$root$library/encodings" "tools/pyhome/${{library#/usr/}}/"
mv tools/ld-linux-*.so.* tools/ld.so
tar -C tools -cf tools.tar .
rm -r tools
chroot "$root" dpkg-query -W -f '${{Package}} ${{Version}}\\n' >packages

cd "$root"
mkdir -p {directories}
{files}
rm -rf var/cache/debconf/*-old var/cache/ldconfig var/log/*.log var/log/apt etc/apt/apt.conf.d/99mmdebstrap
"""

# What the host fetches from $1/tmp/fcvm afterwards.
OUTPUTS = ("vmlinuz", "config", "modules.tar", "tools.tar", "packages")


def script(arch: str) -> str:
    """The script for Debian architecture ``arch``."""
    files = [f"printf %s {shlex.quote(text)} >{name}; chmod 644 {name}" for name, text in FILES.items()]
    return SCRIPT.format(
        kernel_package=KERNEL_PACKAGE.format(arch=arch),
        tools=" ".join(TOOLS),
        no_modules=" ".join(NO_MODULES.split()),
        plain_modules=" ".join(sorted(PLAIN_MODULES.split())),
        directories=" ".join(DIRECTORIES),
        files="\n".join(["mkdir -p etc/containers", *files]),
    )
