package kme

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/peer"
)

// Doctor looks at everything that this node depends on, now, rather than at what the
// last heartbeat said, and says what to do about what is not well. For an operator who
// may act, a key of each link is compared with the peer's, and burned: so many in a time.
func (d OperatorDoor) Doctor(ctx context.Context, c identity.Caller, rid string) ([]admin.Finding, error) {
	k := d.k
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	found := k.Examine()
	took, err := k.heartbeat(ctx)
	found = append(found, judgeHSM(took, err))
	found = append(found, k.examineDatabase(ctx)...)
	var fs syscall.Statfs_t
	err = syscall.Statfs(k.DataDir, &fs)
	found = append(found, judgeDisk(k.DataDir, fs.Bavail*uint64(fs.Bsize), fs.Blocks*uint64(fs.Bsize), err))
	found = append(found, judgeWitness(errors.Join(k.keepTallies(), k.tryDataFolder())))
	found = append(found, k.examineTrail(ctx))
	answers := make(map[identity.KME]bool)
	for id, client := range k.Peers {
		peer := k.examinePeer(ctx, id, client)
		found, answers[id] = append(found, peer...), len(peer) > 1
		if !k.hasTakenOver(id) {
			found = append(found, judgeTakeover(id))
		}
	}
	for _, s := range k.LinkStates() {
		here, _, err := k.Store.Pool(ctx, s.ID)
		found = append(found, judgeLink(s, here, err))
		if l := k.links[s.ID]; err == nil && answers[l.Peer] && k.hasTakenOver(l.Peer) && c.Has(identity.Operating) {
			found = append(found, l.compare(ctx, c, rid, k.Peers[l.Peer].Sample))
		}
	}
	for _, other := range k.watch.others(k.Config.Node) {
		found = append(found, judgeNode(other.Node, other.alive, other.settled))
	}
	return append(found, judgeAlarms(k.Alarms())), nil
}

func (k *KME) examineDatabase(ctx context.Context) []admin.Finding {
	began := time.Now()
	version, wanted, err := k.Store.Schema(ctx)
	if err == nil {
		_, err = k.Store.Standing(ctx) // a commit, which waits for the disk and the standby
	}
	return []admin.Finding{judgeDatabase(time.Since(began), err), judgeSchema(version, wanted, err), judgeSuspended(k.suspended())}
}

// tryDataFolder writes a file there, as what counts does, and takes it away again.
func (k *KME) tryDataFolder() error {
	file := filepath.Join(k.DataDir, "doctor")
	err := writeDurably(file, []byte("written by kmectl doctor\n"))
	if gone := os.Remove(file); err == nil {
		err = gone
	}
	return err
}

// examineTrail looks how the site's audit log is kept.
func (k *KME) examineTrail(ctx context.Context) admin.Finding {
	seen, err := k.lookAtTrail(ctx)
	if err != nil {
		return judgeTrail(0, 0, "", nil, err)
	}
	var trouble []string
	for _, a := range k.Alarms() {
		if strings.HasPrefix(a.Name, trailAlarm) {
			trouble = append(trouble, a.Name+": "+a.Text)
		}
	}
	slices.Sort(trouble)
	return judgeTrail(seen.Events, k.Now().Sub(seen.folded), k.distrusted(), trouble, nil)
}

func (k *KME) examinePeer(ctx context.Context, id identity.KME, client *peer.Client) []admin.Finding {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	asked := time.Now()
	h, err := client.Hello(ctx, k.hello(ctx, id, k.standing(ctx)))
	if err != nil {
		return []admin.Finding{judgePeer(id, 0, err)}
	}
	took := time.Since(asked)
	ahead := time.UnixMilli(h.Clock).Sub(k.Now().Add(-took / 2))
	return []admin.Finding{judgePeer(id, took, nil), judgeOffset(id, ahead)}
}

// Everything below judges what was found. Each says what to do.

func judgeHSM(took time.Duration, err error) admin.Finding {
	switch {
	case err != nil:
		return admin.Bad("hsm", "see to the HSM: runbooks/hsm.md. Nothing is lost meanwhile; kmed asks it again each second", "the token does not answer: %v", err)
	case took > hsmSlow:
		return admin.Bad("hsm", "look for load on the HSM, and at its network: runbooks/slow.md", "the token answers, after %v", took.Round(time.Millisecond))
	}
	return admin.Good("hsm", "the token answered in %v", took.Round(100*time.Microsecond))
}

// databaseSlow is a time for a read and a commit beyond which requests wait for it.
const databaseSlow = time.Second

func judgeDatabase(took time.Duration, err error) admin.Finding {
	switch {
	case err != nil:
		return admin.Bad("database", "start it, or let it fail over; is its disk full? runbooks/database.md. kmed tries by itself", "%v", err)
	case took > databaseSlow:
		return admin.Bad("database", "look at its disks, locks and standby: runbooks/slow.md", "it answers, after %v", took.Round(time.Millisecond))
	}
	return admin.Good("database", "read and committed in %v", took.Round(100*time.Microsecond))
}

func judgeSchema(version, wanted int64, err error) admin.Finding {
	switch {
	case err != nil:
		return admin.Bad("migrations", "the database has to answer first", "not known")
	case version < wanted:
		return admin.Bad("migrations", "kmed migrate, of this release, as the schema's owner", "the schema is version %d, and this program needs %d", version, wanted)
	case version > wanted:
		return admin.Bad("migrations", "install the newer release on this node and restart it", "the schema is version %d, and this program knows %d", version, wanted)
	}
	return admin.Good("migrations", "the schema is version %d", version)
}

func judgeSuspended(why string) admin.Finding {
	if why != "" {
		return admin.Bad("standing", "RECOVERY.md, from its top: bring the newest database back, or kmed recover --burn", "suspended: %s", why)
	}
	return admin.Good("standing", "not suspended")
}

// A data folder's disk should have this much left: runs and witnesses are small, and
// when nothing can be written a crash forgets what was counted.
const (
	diskFree  = 64 << 20 // bytes
	diskShare = 50       // or a fiftieth
)

func judgeDisk(dir string, free, all uint64, err error) admin.Finding {
	switch {
	case err != nil:
		return admin.Bad("disk", "is the data folder there, and mounted?", "looking at %s: %v", dir, err)
	case free < diskFree || free < all/diskShare:
		return admin.Bad("disk", "make room: old logs, old dumps. Not the files of the data folder: they are witnesses", "%d MiB are free where %s lies", free>>20, dir)
	}
	return admin.Good("disk", "%d MiB are free where %s lies", free>>20, dir)
}

func judgeWitness(err error) admin.Finding {
	if err != nil {
		return admin.Bad("data folder", "rights and disk of the data folder: it must belong to the daemon's user, mode 0700", "it takes no writes: %v", err)
	}
	return admin.Good("data folder", "it takes writes")
}

func judgeTakeover(id identity.KME) admin.Finding {
	return admin.Bad("takeover at "+id.String(), "see to the peer: it has to be asked what this node's earlier runs had announced, and is asked again every few seconds",
		"it has not said yet what it assigned for this node's earlier runs: none of its links' keys is handed out here")
}

// judgeTrail judges the audit log: how many events are not in its tree, for how long
// there was no checkpoint, and what was found wrong with the log or with its keeping.
func judgeTrail(waiting int64, late time.Duration, distrusted string, trouble []string, err error) admin.Finding {
	switch {
	case err != nil:
		return admin.Bad("audit", "the database has to answer first", "not known")
	case distrusted != "":
		return admin.Bad("audit", "kmectl audit verify names the first bad leaf: runbooks/tampering.md", "the log is not what was signed: %s", distrusted)
	case len(trouble) > 0:
		return admin.Bad("audit", "runbooks/audit.md, and for each of these alarms DEGRADED.md", "%s", strings.Join(trouble, "; "))
	case late > lagAlarm:
		return admin.Bad("audit", "is the sequencer running (audit.sequencer, or kmed sequencer)? runbooks/audit.md", "%d events wait, and for %v there was no checkpoint", waiting, late.Round(time.Second))
	}
	return admin.Good("audit", "%d events wait to be folded into the log's tree", waiting)
}

func judgePeer(id identity.KME, took time.Duration, err error) admin.Finding {
	about := "peer " + id.String()
	switch {
	case err != nil:
		return admin.Bad(about, "the network between the sites (ports assign and classical of network.yaml), the other site's nodes, both certificates: runbooks/peer.md", "it does not answer: %v", err)
	case took > peerSlow:
		return admin.Bad(about, "look at the network, and at the peer's own database and HSM: runbooks/slow.md", "it answers, after %v", took.Round(time.Millisecond))
	}
	return admin.Good(about, "it answered in %v", took.Round(100*time.Microsecond))
}

func judgeOffset(id identity.KME, ahead time.Duration) admin.Finding {
	about := "clock against " + id.String()
	if ahead.Abs() > clockAlarm {
		return admin.Bad(about, "NTP at both sites: runbooks/clock.md. Beyond 30 s no keys are made", "its clock is %v ahead of ours", ahead.Round(time.Millisecond))
	}
	return admin.Good(about, "its clock is %v ahead of ours", ahead.Round(time.Millisecond))
}

func judgeLink(s LinkState, here int, err error) admin.Finding {
	about := "link " + s.ID
	switch {
	case err != nil:
		return admin.Bad(about, "the database has to answer first", "its pool cannot be counted")
	case s.State == admin.LinkDown || s.State == admin.LinkPaused:
		return admin.Bad(about, "runbooks/link.md: the fibre and its devices, or the part that it names", "%s: %s; %d keys are left to assign here", s.State, s.Why, here)
	case s.LastWhy != "":
		return admin.Bad(about, "runbooks/qber.md: leave it on, and find out whether somebody is on the line", "the last block was given up: %s", s.LastWhy)
	case here == 0:
		return admin.Bad(about, "runbooks/pool.md: it makes fewer keys than are asked for, or has just begun", "%s, and no keys are left to assign here", s.State)
	}
	return admin.Good(about, "%s, %d keys to assign here", s.State, here)
}

func judgeNode(name string, alive, settled bool) admin.Finding {
	about := "node " + name
	switch {
	case alive:
		return admin.Good(about, "it lives")
	case settled:
		return admin.Bad(about, "start it, or take it out of network.yaml: nothing of it is left", "it is not alive")
	}
	return admin.Bad(about, "start it; what it had is being taken over, which may need the peer: runbooks/node-down.md", "it is not alive")
}

func judgeAlarms(alarms []Alarm) admin.Finding {
	if len(alarms) == 0 {
		return admin.Good("alarms", "none")
	}
	names := make([]string, len(alarms))
	for i, a := range alarms {
		names[i] = a.Name
	}
	slices.Sort(names)
	return admin.Bad("alarms", "kmectl alarms has their text, runbooks/alarms.md a page for each", "%d: %v", len(alarms), names)
}

// JudgeCertificate says how long a certificate of this node holds; keys with it end
// when it does.
func JudgeCertificate(about string, end, now time.Time) admin.Finding {
	left := end.Sub(now)
	switch {
	case left <= 0:
		return admin.Bad(about, "put a new one-time token where certificates.token_file says, and restart the node: runbooks/certificates.md", "it ended at %s", end.UTC().Format(time.RFC3339))
	case left < 6*time.Hour:
		return admin.Bad(about, "does the CA answer? The node renews by itself: runbooks/certificates.md", "it ends in %v", left.Round(time.Minute))
	}
	return admin.Good(about, "it ends in %v", left.Round(time.Minute))
}

// JudgeCRL says whether the CRLs of a role's CAs count; trouble is what is wrong with
// them, "" if nothing is.
func JudgeCRL(role, trouble string) admin.Finding {
	about := "CRL of role " + role
	if trouble != "" {
		return admin.Bad(about, "is that CA up, and can this node reach certificates.crls? runbooks/certificates.md", "%s", trouble)
	}
	return admin.Good(about, "there is a late one of each CA")
}
