//! Network namespaces and TUN devices: every system call of this crate.
//!
//! A namespace is made by a thread that leaves the present one and ends; it lives on through a file
//! descriptor. All descriptors close on `exec`, so that no child keeps one.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

/// Large packets cost the switch as much as small ones.
const MTU: i32 = 65_000;
const DEVICE: &str = "tun0";
const TUN_PATH: &str = "/dev/net/tun";
const QUEUE_PACKETS: i32 = 4096;

/// A network namespace with one way out, and what comes and goes there.
#[derive(Debug)]
pub struct Namespace {
    namespace: File,
    device: File,
    address: Ipv4Addr,
}

impl Namespace {
    /// Makes a namespace that has this address on a network of 16 bits.
    ///
    /// # Errors
    /// The system's; without the rights of root it refuses.
    pub fn new(address: Ipv4Addr) -> io::Result<Self> {
        let made = std::thread::Builder::new().name("namespace".into()).spawn(move || {
            leave_namespace()?;
            let namespace = File::open("/proc/thread-self/ns/net")?;
            let device = open_device()?;
            configure(address)?;
            Ok(Self { namespace, device, address })
        })?;
        made.join().map_err(|_| io::Error::other("making a namespace panicked"))?
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Moves the present thread into it: sockets that it makes from now on are there.
    ///
    /// # Errors
    /// The system's.
    pub fn enter(&self) -> io::Result<()> {
        enter(&self.namespace)
    }

    /// A path under which other processes can [`enter_path`] it while this one lives.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd())
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.device.as_raw_fd()
    }

    /// Reads one packet; none if there is none now.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match io::Read::read(&mut &self.device, buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Delivers one packet; false if the kernel has no room for it.
    pub(crate) fn send(&self, packet: &[u8]) -> bool {
        io::Write::write(&mut &self.device, packet).is_ok()
    }
}

/// Moves the present thread into the namespace at this path.
///
/// # Errors
/// The system's.
pub fn enter_path(path: &Path) -> io::Result<()> {
    enter(&File::open(path)?)
}

/// Why namespaces cannot be had here, in words; none if they can.
#[must_use]
pub fn obstacle() -> Option<String> {
    match Namespace::new(Ipv4Addr::new(10, 77, 255, 1)) {
        Ok(_) => None,
        Err(error) => Some(format!("a network namespace with a TUN device: {error}")),
    }
}

/// Waits until one of the descriptors can be read, or for this long. Says which can.
pub(crate) fn wait_readable(descriptors: &[RawFd], patience: Duration) -> io::Result<Vec<bool>> {
    let mut polled: Vec<libc::pollfd> = descriptors
        .iter()
        .map(|fd| libc::pollfd { fd: *fd, events: libc::POLLIN, revents: 0 })
        .collect();
    let patience = libc::timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    let count = polled.len() as libc::nfds_t;
    #[expect(unsafe_code, reason = "there is no safe ppoll")]
    // SAFETY: the array and the time live through the call, and `count` is the array's length.
    let found = unsafe { libc::ppoll(polled.as_mut_ptr(), count, &patience, std::ptr::null()) };
    match check(found) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => {
            Ok(vec![false; descriptors.len()])
        }
        Err(error) => Err(error),
        Ok(()) => Ok(polled.iter().map(|polled| polled.revents != 0).collect()),
    }
}

fn enter(namespace: &File) -> io::Result<()> {
    #[expect(unsafe_code, reason = "there is no safe setns")]
    // SAFETY: takes a valid descriptor and no memory.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })
}

fn leave_namespace() -> io::Result<()> {
    #[expect(unsafe_code, reason = "there is no safe unshare")]
    // SAFETY: takes no memory; only this thread is moved.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })
}

fn open_device() -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let device = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(TUN_PATH)?;
    let flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI);
    let flags = flags.map_err(io::Error::other)?;
    request(device.as_raw_fd(), libc::TUNSETIFF, DEVICE, |data| data.ifru_flags = flags)?;
    Ok(device)
}

/// Gives the device of the present namespace its address and brings it and `lo` up.
fn configure(address: Ipv4Addr) -> io::Result<()> {
    let socket = datagram_socket()?;
    let set = |what, device, fill: &dyn Fn(&mut libc::__c_anonymous_ifr_ifru)| {
        request(socket.as_raw_fd(), what, device, fill)
    };
    set(libc::SIOCSIFADDR, DEVICE, &|data| data.ifru_addr = socket_address(address))?;
    let mask = Ipv4Addr::new(255, 255, 0, 0);
    set(libc::SIOCSIFNETMASK, DEVICE, &|data| data.ifru_netmask = socket_address(mask))?;
    set(libc::SIOCSIFMTU, DEVICE, &|data| data.ifru_mtu = MTU)?;
    set(libc::SIOCSIFTXQLEN, DEVICE, &|data| data.ifru_ifindex = QUEUE_PACKETS)?;
    let up = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(io::Error::other)?;
    for device in ["lo", DEVICE] {
        set(libc::SIOCSIFFLAGS, device, &|data| data.ifru_flags = up)?;
    }
    Ok(())
}

fn datagram_socket() -> io::Result<OwnedFd> {
    #[expect(unsafe_code, reason = "std makes no socket without binding it")]
    // SAFETY: takes no memory, and the descriptor belongs to nobody else.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        check(socket)?;
        Ok(OwnedFd::from_raw_fd(socket))
    }
}

/// One request about a network device.
fn request(
    descriptor: RawFd,
    what: libc::Ioctl,
    device: &str,
    fill: impl Fn(&mut libc::__c_anonymous_ifr_ifru),
) -> io::Result<()> {
    let data = libc::__c_anonymous_ifr_ifru { ifru_ifindex: 0 };
    let mut request = libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: data };
    // The name ends with a 0: all names here are shorter.
    for (place, byte) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *place = byte.cast_signed() as libc::c_char;
    }
    fill(&mut request.ifr_ifru);
    #[expect(unsafe_code, reason = "devices are set up by ioctl")]
    // SAFETY: every request that this file makes takes a pointer to an `ifreq`, which is valid for
    // reads and writes through the call.
    check(unsafe { libc::ioctl(descriptor, what, &raw mut request) })
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // Port, then address, as in `sockaddr_in`.
    for (place, byte) in data[2..6].iter_mut().zip(address.octets()) {
        *place = byte.cast_signed() as libc::c_char;
    }
    let family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default();
    libc::sockaddr { sa_family: family, sa_data: data }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
