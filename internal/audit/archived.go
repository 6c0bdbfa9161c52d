package audit

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"time"
)

// Archived is what an event of a day that left the database says: which leaves of the log
// were written to a bundle before, and which bundle that is.
type Archived struct {
	Day         time.Time
	First, Last int64  // leaves
	Log         string // its name
	File        string
	Sum         [sha256.Size]byte // of the file
}

// String is the reason of the event, which ParseArchived reads.
func (a Archived) String() string {
	return fmt.Sprintf("day %s, leaves %d to %d of %s, is in %s, SHA-256 %x", a.Day.Format(time.DateOnly), a.First, a.Last, a.Log, a.File, a.Sum)
}

// ParseArchived reads what String writes, and nothing else.
func ParseArchived(reason string) (a Archived, err error) {
	var day, log, file string
	var sum []byte
	_, err = fmt.Sscanf(reason, "day %s leaves %d to %d of %s is in %s SHA-256 %x", &day, &a.First, &a.Last, &log, &file, &sum)
	if err == nil {
		a.Day, err = time.Parse(time.DateOnly, strings.TrimSuffix(day, ","))
	}
	a.Log, a.File = strings.TrimSuffix(log, ","), strings.TrimSuffix(file, ",")
	copy(a.Sum[:], sum)
	if err != nil || a.String() != reason {
		return Archived{}, fmt.Errorf("%.120q does not say which leaves are in a bundle (error %w)", reason, err)
	}
	return a, nil
}
